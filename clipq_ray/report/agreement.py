"""Predictions of two networks on the same images: what was lost, won and kept, as a whole and per class.

Both networks see the same images, so the difference of their accuracies has a narrower interval than two separate ones: only the images on which
exactly one is right count (`intent.Drop`). Not covered: top-5, losses, calibration.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipq_ray.intent import Drop

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Agreement:
    """Counts of images: right and wrong in a reference network and in the compressed one; `drop`: what becomes of top-1."""

    both_right: int
    lost: int  # the reference is right, the compressed network wrong
    won: int  # the other way round
    both_wrong: int
    same: int  # equal predictions, right or wrong
    drop: Drop

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
        return self.drop.points

    def drop_interval(self) -> tuple[float, float]:
        """The 95 % interval of the drop in percentage points."""
        return self.drop.low, self.drop.high


def compare(label: Ints, reference: Ints, compressed: Ints) -> Agreement:
    """The agreement on all images; the arguments are int64 (n,) class indices, n >= 1."""
    right, kept = reference == label, compressed == label
    return Agreement(
        both_right=int(np.sum(right & kept)),
        lost=int(np.sum(right & ~kept)),
        won=int(np.sum(~right & kept)),
        both_wrong=int(np.sum(~right & ~kept)),
        same=int(np.sum((reference == compressed) & (reference >= 0))),
        drop=Drop.between(reference, compressed, label),
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
