"""`make bench-codec`: bytes and speed of our coders beside NNCodec 2, `zstd -19` and the order-0 entropy, in one run on one core.

Codes of all conv and linear weights of two networks, quantized once with one (p, b) for all layers (the table of issue 4), and of every
network that CLIP-Q trained in `bench/records`, and of an older one. Symbols are signed around zero: 0 is clipped, levels by their order. Sizes are codes only: no
level tables, no headers, no checksums; every coder's blob is decoded and compared. The peers run in an environment of their own
(`codec_peers.py`); passes of all coders are interleaved, and ratios of speed are medians of ratios within a round.

NNCodec's bytes are those of its coder with the settings that were best for the network (in `notes`), and never more than the table's, which
counts whole bitstreams with names and shapes. Not covered: the file around the codes, and layers in parallel (`packed_file.py`).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.record import ROOT, Row, row, write
from clipq_ray import codec
from clipq_ray.codec import coders
from clipq_ray.plan import Theta
from clipq_ray.quantizer import quantize

Codes = npt.NDArray[np.int16]
Network = list[codec.CodedLayer]

TABLE = {
    ("resnet20", 0.5, 2): 48585,
    ("resnet20", 0.8, 4): 39990,
    ("resnet56", 0.6, 3): 156231,
    ("resnet56", 0.9, 3): 63462,
}
"""The networks of issue 4 and NNCodec's bytes as quoted there."""
FIRST = ROOT / "tests" / "golden" / "v1-resnet20-cifar10.clq"
"""A network of another plan, the first that CLIP-Q trained here; coder "a" was fitted to its codes among others."""
PEER = ROOT / ".venv-nncodec" / "bin" / "python"


class Coder(NamedTuple):
    """A profile of ours, or one coder: a layer to the letter and bytes of its codes. Goals are ratios over NNCodec, but `rate` is weights decoded per second."""

    name: str
    encode: Callable[[codec.CodedLayer], tuple[str, bytes]]
    size: float | None = None
    encoding: float | None = None
    decoding: float | None = None
    rate: float | None = None


def _static(layer: codec.CodedLayer) -> tuple[str, bytes]:
    return "q", coders.encode("q", layer.codes, layer.negative, layer.positive)


def _fast(layer: codec.CodedLayer) -> tuple[str, bytes]:
    return coders.smallest(layer.codes, layer.negative, layer.positive, "fast")


def _small(layer: codec.CodedLayer) -> tuple[str, bytes]:
    return coders.smallest(layer.codes, layer.negative, layer.positive, "small")


OURS = (
    Coder("static", _static),
    Coder("fast", _fast, size=1.02, encoding=5.0, decoding=1.0),
    Coder("small", _small, size=0.97, rate=2e6),
)
"""All that is measured of ours; encoding holds the trying of every coder of the profile."""


class Peers:
    """The process that answers for NNCodec and zstd (`codec_peers.py`)."""

    def __init__(self, python: Path, networks: dict[str, Network]) -> None:
        symbols = {
            f"{name}|{number:03d}": layer.codes.astype(np.int8)
            for name, network in networks.items()
            for number, layer in enumerate(network)
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "codes.npz"
            np.savez(path, allow_pickle=False, **symbols)
            command = [str(python), str(ROOT / "bench" / "codec_peers.py"), str(path)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            about = self._answer()
        self.versions: dict[str, str] = {f"peer {name}": v for name, v in about["versions"].items()}
        self.compiled_with: str = about["compiled_with"]

    def ask(self, network: str, what: str) -> dict[str, Any]:
        """What the peers say to one request."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"network": network, "do": what}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("codec: the peers' process ended; its error stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def quantized(weights: Path, theta: Theta) -> Network:
    """The layers of one network, each quantized once."""
    from safetensors.torch import load_file

    result = []
    for weight in load_file(weights).values():
        if weight.dim() > 1:
            made = quantize(weight, theta)
            negative = int(np.flatnonzero(made.levels.numpy() == 0)[0])
            result.append(codec.CodedLayer.from_quantized(made.codes.numpy(), made.levels.numpy(), negative))
    return result


def recorded(path: Path) -> Network:
    """The layers of a network that CLIP-Q trained."""
    tensors = codec.decode(path.read_bytes()).tensors.values()
    return [tensor for tensor in tensors if isinstance(tensor, codec.CodedLayer)]


def order_0(layer: codec.CodedLayer) -> float:
    """Entropy of the codes as if they were independent, in bytes."""
    share = np.unique(layer.codes, return_counts=True)[1] / layer.codes.size
    return -math.fsum(share * np.log2(share)) * layer.codes.size / 8


def one_pass(coder: Coder, network: Network) -> tuple[int, float, float]:
    """Bytes, seconds to encode and seconds to decode; `AssertionError` if codes come back other than they went."""
    began = time.perf_counter()
    blobs = [coder.encode(layer) for layer in network]
    between = time.perf_counter()
    found = [
        coders.decode(letter, blob, layer.shape, layer.negative, layer.positive)
        for (letter, blob), layer in zip(blobs, network, strict=True)
    ]
    ended = time.perf_counter()
    for layer, codes in zip(network, found, strict=True):
        np.testing.assert_array_equal(codes, layer.codes)
    return sum(len(blob) for _, blob in blobs), between - began, ended - between


def measured(
    name: str, network: Network, peers: Peers, quoted: int | None, repeats: int
) -> tuple[list[Row], dict[str, Any]]:
    """All rows of one network, and NNCodec's settings for it."""
    place, count = f"codec/{name}", sum(layer.codes.size for layer in network)
    best = peers.ask(name, "best")
    bound = min(best["bytes"], best["bytes"] if quoted is None else quoted)
    rows = [
        Row(f"{place}/entropy/bytes", sum(map(order_0, network)), "bytes"),
        Row(f"{place}/zstd-19/bytes", peers.ask(name, "zstd")["bytes"], "bytes"),
        Row(f"{place}/nncodec/bytes", best["bytes"], "bytes"),
        Row(f"{place}/nncodec-best-by-layer/bytes", best["by_layer"], "bytes"),
    ]
    if quoted is not None:
        rows.append(Row(f"{place}/nncodec-quoted/bytes", quoted, "bytes"))
    sizes, encoding, decoding = rounds(name, network, peers, repeats)
    for who in ("nncodec", *(coder.name for coder in OURS)):
        rows += [
            row(f"{place}/{who}/encoding", [count / t for t in encoding[who]], "weights/s"),
            row(f"{place}/{who}/decoding", [count / t for t in decoding[who]], "weights/s",
                goal=next((coder.rate for coder in OURS if coder.name == who), None), better="higher"),
        ]  # fmt: skip
    for coder in OURS:
        us = f"{place}/{coder.name}"
        faster = {
            what: [peer / own for peer, own in zip(times["nncodec"], times[coder.name], strict=True)]
            for what, times in (("encoding", encoding), ("decoding", decoding))
        }
        rows += [
            Row(f"{us}/bytes", sizes[coder.name], "bytes"),
            Row(f"{us}/bytes_over_nncodec", sizes[coder.name] / bound, "ratio", goal=coder.size),
            row(f"{us}/encoding_over_nncodec", faster["encoding"], "ratio", goal=coder.encoding, better="higher"),
            row(f"{us}/decoding_over_nncodec", faster["decoding"], "ratio", goal=coder.decoding, better="higher"),
        ]  # fmt: skip
    return rows, best["settings"]


def rounds(
    name: str, network: Network, peers: Peers, repeats: int
) -> tuple[dict[str, int], dict[str, list[float]], dict[str, list[float]]]:
    """Bytes by coder, and seconds of every round; a round is one pass of each of ours and of NNCodec."""
    sizes: dict[str, int] = {}
    everyone = ("nncodec", *(coder.name for coder in OURS))
    encoding: dict[str, list[float]] = {who: [] for who in everyone}
    decoding: dict[str, list[float]] = {who: [] for who in everyone}
    for _ in range(repeats):
        theirs = peers.ask(name, "pass")
        encoding["nncodec"].append(theirs["encoding"])
        decoding["nncodec"].append(theirs["decoding"])
        for coder in OURS:
            size, to, back = one_pass(coder, network)
            sizes[coder.name] = size
            encoding[coder.name].append(to)
            decoding[coder.name].append(back)
    return sizes, encoding, decoding


def main() -> None:
    """All rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--weights", type=Path, required=True, help="folder of resnet20- and resnet56-cifar10.safetensors"
    )
    parser.add_argument("--repeats", type=int, default=30, help="rounds per network (default: %(default)s)")
    parser.add_argument("--peer", type=Path, default=PEER, help="Python with NNCodec, see codec_peers.txt")
    given = parser.parse_args()
    networks = {
        f"{network}-p{p}-b{b}": quantized(given.weights / f"{network}-cifar10.safetensors", Theta(p, b))
        for network, p, b in TABLE
    }
    quoted = dict(zip(networks, TABLE.values(), strict=True))
    for path in (*sorted((ROOT / "bench" / "records").glob("*.clq")), FIRST):
        networks[f"{path.stem}-trained"] = recorded(path)
    peers = Peers(given.peer, networks)
    for coder in OURS:  # compiled outside of the measurement
        one_pass(coder, next(iter(networks.values()))[:1])
    rows: list[Row] = []
    settings: dict[str, Any] = {}
    for name, network in networks.items():
        found, settings[name] = measured(name, network, peers, quoted.get(name), given.repeats)
        rows += found
    peers.close()
    notes = {"nncodec_settings": settings, "nncodec_compiled_with": peers.compiled_with}
    print(write("codec", rows, notes=notes, versions=peers.versions))


if __name__ == "__main__":
    main()
