"""The size that a layer would have as Deep Compression (Han et al., ICLR 2016) counts it, to compare with the literature's numbers.

Weights are taken in the order in which they are stored. Every weight that is not zero is an entry: its code, and the zeros since the entry
before as a number of a few bits. Where more zeros follow one another than that number can say, an entry of weight zero stands in between.
Codes and gaps are Huffman coded, each with a table per layer; the levels are float32. As in that paper, the Huffman tables themselves are
not counted. No file has this size: it is never reported as the size of a .clq file, which is measured.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipq_ray import codec

CONVOLUTION_INDEX_BITS, LINEAR_INDEX_BITS = 8, 4


@dataclass(frozen=True)
class Size:
    """What the parts take: `entries` counts those of weight zero too."""

    entries: int
    code_bits: int
    gap_bits: int
    codebook_bytes: int

    @property
    def bytes(self) -> int:
        """All of it, rounded up to a byte."""
        return -(-(self.code_bits + self.gap_bits) // 8) + self.codebook_bytes


def layer_size(layer: codec.CodedLayer, index_bits: int | None = None) -> Size:
    """The size of one layer; `index_bits` of a gap are by default 8 for a convolution and 4 for a linear layer."""
    if index_bits is None:
        index_bits = CONVOLUTION_INDEX_BITS if layer.codes.ndim > 2 else LINEAR_INDEX_BITS
    flat = layer.codes.reshape(-1)
    places = np.flatnonzero(flat)
    zeros = np.diff(places, prepend=-1) - 1
    padding = int((zeros >> index_bits).sum())
    gaps = np.bincount(zeros & (1 << index_bits) - 1, minlength=1 << index_bits)
    gaps[-1] += padding
    codes = np.bincount(flat[places].astype(np.int64) + layer.negative, minlength=layer.levels.size)
    codes[layer.negative] = padding
    return Size(
        entries=places.size + padding,
        code_bits=huffman_bits(codes),
        gap_bits=huffman_bits(gaps),
        codebook_bytes=4 * (layer.levels.size - 1),
    )


def network_bytes(layers: Iterable[codec.CodedLayer]) -> int:
    """The sum over layers."""
    return sum(layer_size(layer).bytes for layer in layers)


def huffman_bits(counts: npt.NDArray[np.int64]) -> int:
    """Bits of a text by its own Huffman code; `counts`: how often each symbol occurs. A single symbol takes a bit each time."""
    heap = [int(count) for count in counts if count]
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    bits = 0
    while len(heap) > 1:  # every merge adds a bit to each symbol below it
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        bits += merged
        heapq.heappush(heap, merged)
    return bits
