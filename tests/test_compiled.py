"""Compiled functions are cached on disk where that can be written, and work where it cannot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clipq_ray import compiled
from clipq_ray.codec import adaptive_kernels, mixing_kernels
from clipq_ray.quantizer import kernels, selection

ROOT = Path(__file__).resolve().parents[1]
MODULES = (adaptive_kernels, mixing_kernels, kernels, selection)
NOWHERE = """
from numba.core import caching
for name in ("CacheImpl", "_CacheImpl"):  # as of numba 0.68, and before
    if kind := getattr(caching, name, None):
        kind._locator_classes = []
"""
"""As where neither the package's folder nor the user's cache folder can be written, which root can always."""


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    return subprocess.run(
        [sys.executable, "-c", NOWHERE + code], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
        env={**environment, "HOME": "/nonexistent"},
    )  # fmt: skip


def test_every_function_that_python_calls_is_cached_on_disk() -> None:
    for module in MODULES:
        names = re.findall(r"@cached\(nogil=True\)\ndef (\w+)", Path(str(module.__file__)).read_text())
        assert names
        for name in names:
            function = getattr(module, name)
            assert Path(function.stats.cache_path).is_dir(), name
            assert function.targetoptions["nogil"] is True, name


def test_numba_itself_refuses_a_function_without_a_place_on_disk() -> None:
    done = run(
        "from numba import njit\nimport clipq_ray.seeds as any_module\nnjit(cache=True)(any_module.generator)"
    )
    assert "no locator available" in done.stderr


def test_without_a_place_on_disk_functions_are_compiled_in_each_process() -> None:
    names = ", ".join(module.__name__ for module in MODULES)
    done = run(f"import {names}\nfrom clipq_ray.quantizer.kernels import scale_of\n"
               "print(scale_of(1000, 0.75), scale_of.stats.cache_path)")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(kernels.scale_of(1000, 0.75)), "None"]


def test_commands_run_without_a_place_on_disk() -> None:
    file = ROOT / "tests" / "golden" / "v1-small.clq"
    done = run(
        f"import sys\nfrom clipq_ray.cli import main\nimport clipq_ray.pipeline\nsys.exit(main(['verify', {str(file)!r}]))"
    )
    assert (done.returncode, done.stdout) == (0, f"{file}: ok\n"), done.stderr


def test_another_error_of_numba_is_no_lack_of_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(compiled, "njit", refuse)
    with pytest.raises(RuntimeError, match="something else"):
        compiled.cached(nogil=True)(abs)


def test_what_calls_compiled_functions_of_another_file_is_compiled_anew_when_that_is_edited(
    tmp_path: Path,
) -> None:
    inner, outer = tmp_path / "inner_kernels.py", tmp_path / "outer_kernels.py"
    outer.write_text(
        "import inner_kernels\n"
        "from clipq_ray.compiled import cached, source_of\n"
        "@cached(nogil=True)\n"
        "def twice(x, of=source_of(inner_kernels)):\n"
        "    return 2 * inner_kernels.changed(x)\n"
    )
    found = []
    for more in (1, 1, 5):
        inner.write_text(
            f"from clipq_ray.compiled import cached\n@cached(nogil=True)\ndef changed(x):\n    return x + {more}\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", "import outer_kernels as o; print(o.twice(10), sum(o.twice.stats.cache_hits.values()))"],
            capture_output=True, text=True, check=True, cwd=tmp_path, timeout=300,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        )  # fmt: skip
        found.append(done.stdout.split())
    assert found == [["22", "0"], ["22", "1"], ["30", "0"]]


def test_the_whole_operator_is_compiled_anew_when_its_thresholds_are_edited() -> None:
    assert kernels.whole_layer.py_func.__defaults__ == (compiled.source_of(selection),)
