"""`make bench-codec`: bytes of coder "m" against order-0 entropy, coder "q" and quoted NNCodec sizes, and its speed on one core.

Codes of all conv and linear weights of the given networks, quantized once with one (p, b) for all layers, and of the trained network in
`bench/records`. Sizes are codes only: no levels, no header, no checksums; "m" includes its two bytes per layer of start values, "q" its
frequencies. NNCodec's sizes are quoted, not measured here. The goal of a size is 0.97 times the quoted one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.record import ROOT, Row, row, write
from clipq_ray import codec
from clipq_ray.codec import layers, mixing
from clipq_ray.plan import Theta
from clipq_ray.quantizer import quantize

QUOTED = {
    ("resnet20", 0.5, 2): (48585, 47127),
    ("resnet20", 0.8, 4): (39990, 38790),
    ("resnet56", 0.6, 3): (156231, 151544),
    ("resnet56", 0.9, 3): (63462, 61558),
}
"""NNCodec's bytes and the goal."""
SPEED = 2e6
"""Codes per second that decoding must reach."""


def entropy(layer: codec.CodedLayer) -> float:
    """Order-0 entropy of the codes in bytes."""
    share = np.unique(layer.codes, return_counts=True)[1] / layer.codes.size
    return float(-(share * np.log2(share)).sum() * layer.codes.size / 8)


def quantized(weights: Path, theta: Theta) -> list[codec.CodedLayer]:
    """The layers of one network."""
    from safetensors.torch import load_file

    state = load_file(weights)
    result = []
    for weight in state.values():
        if weight.dim() > 1:
            made = quantize(weight, theta)
            negative = int(np.flatnonzero(made.levels.numpy() == 0)[0])
            result.append(codec.CodedLayer.from_quantized(made.codes.numpy(), made.levels.numpy(), negative))
    return result


def trained() -> list[codec.CodedLayer]:
    """The layers of the network that CLIP-Q trained."""
    packed = codec.decode((ROOT / "bench" / "records" / "resnet20-cifar10.clq").read_bytes())
    return [tensor for tensor in packed.tensors.values() if isinstance(tensor, codec.CodedLayer)]


def measured(name: str, network: list[codec.CodedLayer], quoted: tuple[int, int] | None) -> list[Row]:
    """Sizes and speeds of one network; a round trip checks every layer."""
    n = sum(layer.codes.size for layer in network)
    sides = [(layer.negative, len(layer.levels) - 1 - layer.negative) for layer in network]
    encoding, decoding = [], []
    for _ in range(5):
        began = time.perf_counter()
        blobs = [mixing.encode(layer.codes, *side) for layer, side in zip(network, sides, strict=True)]
        between = time.perf_counter()
        codes = [
            mixing.decode(blob, layer.codes.shape, *side)
            for blob, layer, side in zip(blobs, network, sides, strict=True)
        ]
        decoding.append(n / (time.perf_counter() - between))
        encoding.append(n / (between - began))
    for layer, found in zip(network, codes, strict=True):
        np.testing.assert_array_equal(found, layer.codes)
    size, plain = sum(map(len, blobs)), sum(map(entropy, network))
    levels = sum(2 + 4 * (len(layer.levels) - 1) for layer in network)
    static = sum(len(layers.write(layer)) for layer in network) - levels
    goal = None if quoted is None else quoted[1]
    against = "-" if quoted is None else f"{size / quoted[0]:.3f} of NNCodec's quoted {quoted[0]}"
    print(
        f"{name}: {n} codes, order-0 entropy {plain:.0f}, static {static}, mixing {size} ({size / plain:.3f} of the entropy, {against}), "
        f"encoding {statistics.median(encoding) / 1e6:.2f} M/s, decoding {statistics.median(decoding) / 1e6:.2f} M/s"
    )
    rows = [
        Row(f"{name} order-0 entropy", plain, "bytes"),
        Row(f"{name} static", static, "bytes"),
        Row(f"{name} mixing", size, "bytes", goal=goal),
        Row(f"{name} mixing over entropy", size / plain, "ratio"),
        row(f"{name} encoding", encoding, "codes/s"),
        row(f"{name} decoding", decoding, "codes/s", goal=SPEED, better="higher"),
    ]
    if quoted is not None:
        rows.append(Row(f"{name} NNCodec (quoted)", quoted[0], "bytes"))
    return rows


def main() -> None:
    """All rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--weights", type=Path, required=True, help="folder of resnet20- and resnet56-cifar10.safetensors"
    )
    given = parser.parse_args()
    mixing.encode(np.ones((2, 2), np.int16), 1, 1)  # compiled outside of the measurement
    rows = []
    for (network, p, b), quoted in QUOTED.items():
        layers_ = quantized(given.weights / f"{network}-cifar10.safetensors", Theta(p, b))
        rows += measured(f"{network} p={p} b={b}", layers_, quoted)
    rows += measured("resnet20 trained", trained(), None)
    print(write("codec_size", rows))


if __name__ == "__main__":
    main()
