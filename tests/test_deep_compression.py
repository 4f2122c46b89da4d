"""Deep Compression's size is what a hand-computed example gives."""

from __future__ import annotations

import numpy as np
import pytest

from clipq_ray import codec
from clipq_ray.deep_compression import Size, huffman_bits, layer_size, network_bytes


def layer(codes: list[int], shape: tuple[int, ...]) -> codec.CodedLayer:
    levels = np.array([-0.5, 0.0, 0.25, 0.75], np.float32)
    return codec.CodedLayer(np.array(codes, np.int16).reshape(shape), levels, 1)


def test_a_layer_counted_by_hand() -> None:
    # 1, five zeros, 2, a zero, 1, a zero at the end. Gaps of 2 bits say up to 3 zeros, so a padding entry (3 zeros, then its own) stands
    # before the 2. Entries (gap, code): (0, 1) (3, 0) (1, 2) (1, 1). Gaps occur 1, 1, 2 times: 1-bit and 2-bit codewords, 6 bits. So do codes.
    size = layer_size(layer([1, 0, 0, 0, 0, 0, 2, 0, 1, 0], (2, 5)), index_bits=2)
    assert size == Size(entries=4, code_bits=6, gap_bits=6, codebook_bytes=12)
    assert size.bytes == 2 + 12


def test_a_gap_that_just_fits_needs_no_padding() -> None:
    assert layer_size(layer([0, 0, 0, 1], (1, 4)), index_bits=2).entries == 1
    assert layer_size(layer([0, 0, 0, 0, 1], (1, 5)), index_bits=2).entries == 2
    assert layer_size(layer([0] * 8 + [-1], (1, 9)), index_bits=2).entries == 3


def test_convolutions_have_gaps_of_8_bits_and_linear_layers_of_4() -> None:
    codes = [0] * 20 + [1] + [0] * 3
    assert layer_size(layer(codes, (2, 12))).entries == 2
    assert layer_size(layer(codes, (2, 3, 2, 2))).entries == 1


def test_a_layer_of_zeros_takes_its_codebook_alone() -> None:
    zeros = layer([0] * 9, (3, 3))
    assert layer_size(zeros) == Size(entries=0, code_bits=0, gap_bits=0, codebook_bytes=12)
    assert network_bytes([zeros, zeros]) == 24


@pytest.mark.parametrize(
    ("counts", "bits"), [([], 0), ([5], 5), ([3, 0, 1], 4), ([4, 2, 1, 1], 14), ([1] * 8, 24)]
)
def test_huffman_bits_are_those_of_the_code(counts: list[int], bits: int) -> None:
    assert huffman_bits(np.array(counts, np.int64)) == bits
