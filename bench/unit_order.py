"""`python bench/unit_order.py FILE...`: bytes of a file's layers as its units stand, and with units sorted and zeros at the end left out.

A file that was packed with sorted units says the same twice. `tests/bench/test_unit_order_bench.py` runs it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from clipq_ray import codec, loading, unit_order


def main() -> int:
    """A line for each file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    for path in parser.parse_args().files:
        data = path.read_bytes()
        model, packed = loading.from_bytes(data), codec.decode(data)
        given = {name: one for name, one in packed.tensors.items() if isinstance(one, codec.CodedLayer)}
        sample = torch.randn(
            50, *packed.metadata["input"]["shape"], generator=torch.Generator().manual_seed(0)
        )
        sizes = [
            sum(codec.layer_bytes(one, "small") for one in layers.values())
            for layers in (given, unit_order.sort(model, given, sample))
        ]
        print(f"{path}: {len(data):,} bytes; layers {sizes[0]:,} as they stand, {sizes[1]:,} sorted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
