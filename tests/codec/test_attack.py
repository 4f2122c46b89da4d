"""No hostile file harms its reader: it is refused by `ArtifactError`, or read as its header says, in bounded time and memory (`attack`).

100,000 cases in CI; `CLIPQ_ATTACK_CASES` and `CLIPQ_ATTACK_SEED` say how many others.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import attack
import attack_headers
import attack_oracle
import attack_seeds
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from clipq_ray import codec
from clipq_ray.codec import header, varint
from clipq_ray.codec.dictionaries import DICTIONARIES
from clipq_ray.errors import ArtifactError

CASES = int(os.environ.get("CLIPQ_ATTACK_CASES", "100000"))
SEED = int(os.environ.get("CLIPQ_ATTACK_SEED", "0"))
BATCH = max(20, CASES // 20000)
"""Hypothesis draws a family and a number; that is one example, and so many cases: files of the family by successive numbers."""
SECONDS_PER_CASE = 0.006  # far above what one takes, for the limit of the whole run

READERS = {
    "header": {"build", "fewest_bytes"},
    "container": {"encode", "_grids"},
    "layers": {
        "from_quantized",
        "halved",
        "coded",
        "layer_bytes",
        "smallest",
        "_are_half",
        "_levels",
        "write",
        "_trimmed",
        "_sides",
        "_views",
        "_last",
        "_kernels",
        "_as_kernels",
    },
    "vectors": {"on_grid", "location", "write"},
    "plain": {"write", "halved", "stored"},
    "static": {"encode", "frequencies"},
    "coders": {"smallest", "encode"},
    "varint": {"write", "fold"},
    "codes": {"start", "check_codes"},
    "adaptive": {"encode"},
    "adaptive_kernels": {"write", "survey", "_asked", "_look", "_put", "_list", "_code", "_ended"},
    "mixing": {"encode", "_log_odds"},
    "mixing_kernels": {"_emit"},
}
"""The modules that read, and their functions that only write or that have run when the module was imported."""
COVERED_CASES = 2400
VALUES_SHA256 = "6f19414eebea3015b479ac625f10ee67888cdc5d809029f54ee89dc478ab0e3a"


@pytest.mark.slow
@pytest.mark.timeout(300 + CASES * SECONDS_PER_CASE)
def test_no_hostile_file_does_more_than_be_refused_or_read() -> None:
    drawn = settings(
        max_examples=CASES // BATCH, derandomize=True, database=None, deadline=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    with attack_oracle.Oracle() as oracle:

        @drawn
        @given(family=st.sampled_from(attack.FAMILIES), number=st.integers(0, 1 << 40))
        def strike(family: str, number: int) -> None:
            for at in range(number * BATCH, (number + 1) * BATCH):
                oracle.check(attack.case(family, at, SEED), f"attack.case({family!r}, {at}, {SEED})")

        strike()
    print(oracle)
    count = oracle.families.total()
    assert count >= CASES // BATCH * BATCH
    assert oracle.mended >= 0.5 * count
    assert oracle.coded >= 0.1 * count
    assert set(oracle.families) == set(attack.FAMILIES)


def test_the_files_that_are_attacked_hold_what_they_always_held() -> None:
    """So that a case whose bytes are as before is compared with what was written, not only with what is read."""
    digest = hashlib.sha256()
    for seed in attack_seeds.seeds():
        for name, array in codec.arrays(seed.data).items():
            digest.update(repr((name, array.dtype.str, array.shape)).encode() + array.tobytes())
    assert digest.hexdigest() == VALUES_SHA256
    assert {seed.data[3] for seed in attack_seeds.seeds()} == set(DICTIONARIES)


def test_every_cut_and_every_flipped_byte_of_a_small_file_is_refused() -> None:
    for seed in attack_seeds.seeds():
        for at in range(0, len(seed.data), 1 + len(seed.data) // 400):
            flipped = bytearray(seed.data)
            flipped[at] ^= 1 << at % 8
            for data in (seed.data[:at], bytes(flipped)):
                with pytest.raises(ArtifactError):
                    codec.decode(data)


@pytest.mark.parametrize("kind", attack_headers.BOMBS)
@pytest.mark.parametrize("size", [header.JSON_LIMIT - 64, header.JSON_LIMIT + 64])
def test_a_header_that_unpacks_to_as_much_as_it_may_takes_little_time_and_memory(
    kind: str, size: int
) -> None:
    draft = attack_seeds.seeds()[1].draft()
    draft.text = attack_headers.bomb(kind, size)
    with attack_oracle.Oracle() as oracle:
        oracle.check(attack_seeds.Case("bombs", draft.bytes(), attack_seeds.seeds()[1], True))


@pytest.mark.parametrize("coder", ["q", "a", "m", "vq", "va", "vm"])
@pytest.mark.parametrize(
    "shape", [[1, 1 << 22], [1 << 22, 1], [1 << 11, 1 << 11], [2, 2, 1 << 10, 1 << 10], [1 << 18, 4, 4]]
)
def test_a_small_file_of_as_many_elements_as_it_may_have_takes_little_time_and_memory(
    coder: str, shape: list[int]
) -> None:
    words = b"\x80\x80\1\0" if coder.endswith("q") else b"\0\1" + b"\0\1" * 300
    blob = b"\1\1" + (b"\1\1" if coder.startswith("v") else bytes(8)) + words
    table = (
        {"v": [["x", shape]], "k": coder[1:]}
        if coder.startswith("v")
        else {"n": ["x"], "s": [shape], "c": [coder]}
    )
    data = attack_seeds.Draft(2, {"m": {}, **table}, [blob]).bytes()
    with attack_oracle.Oracle() as oracle:
        oracle.check(attack_seeds.Case("huge", data, attack_seeds.seeds()[0], True))


@pytest.mark.slow
def test_the_slowest_small_file_takes_a_microsecond_per_element() -> None:
    blob = b"\1\1" + bytes(8) + b"\0\1" + bytes(700)
    draft = attack_seeds.Draft(2, {"m": {}, "n": ["x"], "s": [[1 << 11, 1 << 11]], "c": ["m"]}, [blob])
    with attack_oracle.Oracle() as oracle:
        oracle.check(attack_seeds.Case("huge", draft.bytes(), attack_seeds.seeds()[0], True))


def test_hostile_blobs_are_refused_by_threads_as_by_one() -> None:
    constant = b"\1\1" + bytes(8) + b"\x80\x80\1\0"
    draft = attack_seeds.Draft(
        2, {"m": {}, "n": ["a", "b"], "s": [[1 << 19], [1 << 18]], "c": ["q", "q"]}, [constant] * 2
    )
    assert codec.arrays(draft.bytes(), threads=2)["b"].shape == (1 << 18,)
    draft.blobs[1] = b"\1"
    with pytest.raises(ArtifactError, match="tensor b"):
        codec.decode(draft.bytes(), threads=2)


def test_sizes_beyond_what_python_prints_are_refused() -> None:
    digits = "9" * 4300
    text = f'{{"t":[["a",[1],"q",{digits}],["b",[1],"q",{digits}]],"m":{{}}}}'
    with pytest.raises(ArtifactError):
        codec.metadata(attack_seeds.Draft(1, {}, [], text=text.encode()).bytes())


@pytest.mark.parametrize(
    "text",
    [
        b'{"m":{"x":1e400}}',
        b'{"m":{"x":NaN}}',
        '{"m":{}}'.encode("utf-16"),
        b'\xef\xbb\xbf{"m":{}}',
        b'{"m":{},"needs":{}}',
        b'{"m":{},"needs":""}',
        b'{"m":{},"n":{},"s":{},"c":""}',
        b'{"m":{"x":' + b"[" * 64 + b"]" * 64 + b"}}",
        b'{"m":{"x":{"a":1,"a":1}}}',
        b'{"m":{"x":"\\ud800"}}',
    ],
)
def test_what_the_specification_forbids_in_a_header_is_refused(text: bytes) -> None:
    with pytest.raises(ArtifactError):
        codec.metadata(attack_seeds.Draft(2, {}, [], text=text).bytes())


def test_a_size_of_more_bits_than_the_specification_allows_is_refused() -> None:
    draft = attack_seeds.seeds()[1].draft()
    draft.tail = varint.write(1 << 48) * len(draft.blobs)
    with pytest.raises(ArtifactError, match="48 bits"):
        codec.entries(draft.bytes())


def measure() -> None:
    """Prints, by module, the lines of its reading functions and those that no case reached; run where kernels are not compiled.

    From its input come the files that are attacked: what writes them relies on numbers that wrap, as compiled ones do.
    """
    import coverage

    whole = [bytes.fromhex(line) for line in sys.stdin.read().split()]
    attack_seeds.files = lambda: whole
    modules = {name: importlib.import_module(f"clipq_ray.codec.{name}") for name in READERS}
    cases = [attack.case(attack.FAMILIES[at % len(attack.FAMILIES)], at) for at in range(COVERED_CASES)]
    cases += [attack_seeds.Case("seed", seed.data, seed, True) for seed in attack_seeds.seeds()]
    watch = coverage.Coverage(include=[module.__file__ for module in modules.values()], data_file=None)
    with attack_oracle.Oracle(seconds=30) as oracle:
        watch.start()
        for at, one in enumerate(cases):
            if not attack_oracle.takes_long(one):
                oracle.check(one, f"case {at}")
        watch.stop()
    found = {name: _lines(watch, name, module) for name, module in modules.items()}
    print(json.dumps({"cases": oracle.families.total(), "lines": found}))


def _lines(watch: Any, name: str, module: ModuleType) -> tuple[list[int], list[int]]:
    """Lines of a module's reading functions, and those among them that did not run."""
    _, statements, _, missing, _ = watch.analysis2(module.__file__)
    tree = ast.parse(Path(str(module.__file__)).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    spans = {node: set(range(node.body[0].lineno, (node.end_lineno or 0) + 1)) for node in functions}
    writing = [node for node in functions if node.name in READERS[name]]
    assert {node.name for node in writing} == READERS[name], f"{name} has no such function"
    reading = set().union(*spans.values()).difference(*(spans[node] for node in writing))
    return sorted(reading & set(statements)), sorted(reading & set(missing))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_at_least_95_percent_of_the_readers_lines_run_under_attack() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", "import test_attack; test_attack.measure()"],
        cwd=Path(__file__).parent, env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True, check=False,
        input="\n".join(seed.data.hex() for seed in attack_seeds.seeds()),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    lines: dict[str, tuple[list[int], list[int]]] = json.loads(run.stdout)["lines"]
    reading = sum(len(all_lines) for all_lines, _ in lines.values())
    missed = {name: missing for name, (_, missing) in lines.items() if missing}
    print(f"{reading} lines, not run: {missed}")
    assert sum(map(len, missed.values())) <= 0.05 * reading, missed
    for name, (all_lines, missing) in lines.items():
        assert len(missing) <= max(0.15 * len(all_lines), 2), (name, missing)
