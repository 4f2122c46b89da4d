"""Predictions of two networks on the same images: what was lost, won and kept, as a whole and per class.

Both networks see the same images, so the difference of their accuracies has a narrower interval than two separate ones: only the images on which
exactly one is right count. The interval is Agresti and Min's (2005) adjusted Wald interval for paired proportions: half an
image is added to each of the four cells. Not covered: top-5, losses, calibration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

# The 97.5 % point of the normal distribution.
_Z = 1.959963984540054


@dataclass(frozen=True)
class Agreement:
    """Counts of images: right and wrong in a reference network and in the compressed one."""

    both_right: int
    lost: int  # the reference is right, the compressed network wrong
    won: int  # the other way round
    both_wrong: int
    same: int  # equal predictions, right or wrong

    @property
    def n(self) -> int:
        """All images."""
        return self.both_right + self.lost + self.won + self.both_wrong

    @property
    def same_percent(self) -> float:
        """How often both predict the same class, in percent."""
        return 100.0 * self.same / self.n

    @property
    def reference_percent(self) -> float:
        """Top-1 accuracy of the reference in percent."""
        return 100.0 * (self.both_right + self.lost) / self.n

    @property
    def compressed_percent(self) -> float:
        """Top-1 accuracy of the compressed network in percent."""
        return 100.0 * (self.both_right + self.won) / self.n

    @property
    def drop_points(self) -> float:
        """Reference minus compressed in percentage points; above zero is a loss."""
        return 100.0 * (self.lost - self.won) / self.n

    def drop_interval(self) -> tuple[float, float]:
        """The 95 % interval of the drop in percentage points (paired, Agresti and Min)."""
        lost, won, n = self.lost + 0.5, self.won + 0.5, self.n + 2.0
        centre = (lost - won) / n
        half = _Z * math.sqrt(max(0.0, lost + won - (lost - won) ** 2 / n)) / n
        return 100.0 * (centre - half), 100.0 * (centre + half)


def compare(label: Ints, reference: Ints, compressed: Ints) -> Agreement:
    """The agreement on all images; the arguments are int64 (n,) class indices, n >= 1."""
    right, kept = reference == label, compressed == label
    return Agreement(
        both_right=int(np.sum(right & kept)),
        lost=int(np.sum(right & ~kept)),
        won=int(np.sum(~right & kept)),
        both_wrong=int(np.sum(~right & ~kept)),
        same=int(np.sum(reference == compressed)),
    )


def per_class(label: Ints, reference: Ints, compressed: Ints) -> list[tuple[int, Agreement]]:
    """The agreement on the images of each class that occurs: the largest drop first, ties by class index."""
    order = np.argsort(label, kind="stable")
    classes, starts = np.unique(label[order], return_index=True)
    rows = [
        (int(name), compare(label[part], reference[part], compressed[part]))
        for name, part in zip(classes, np.split(order, starts[1:]), strict=True)
    ]
    return sorted(rows, key=lambda row: (-row[1].drop_points, row[0]))
