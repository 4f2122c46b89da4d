"""What the user wants of the result, and which size to try next: pure decisions, so that policy is tested without training.

An intent is a promise on the file: at most so many bytes, or a top-1 on the validation images at most so many points below the reference
(method, section 4). Fine-tuning goes in rounds: after each, the decoded file says whether the promise is kept, and `next_request` whether
another size is worth a round: smaller ones while it is kept, larger ones while it is not. What is asked for is always the file; `before_training` says how
many bytes to plan for it. A lambda of the user's own promises nothing and takes one round. Not covered: which layers give the bytes (`search`), and training (`rounds`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from clipq_ray.config import Config

T = TypeVar("T")
Kind = Literal["bytes", "max_drop", "tradeoff"]
_Z95 = 1.959963984540054
CLOSE = 1.05
"""A kept and a broken promise whose sizes are within this ratio leave nothing to look for between them."""
SMALLER, LARGER = 0.75, 1.4
"""Of the last size, while nothing on the other side is known."""
SPARE = 0.985
"""Of the bytes that a promised file may take, what to hold training at, and to ask for where no rungs lead to it: files end a little beside their plan, and
a further round for so little costs accuracy (bench/LOG.md)."""
SPARE_FOR_CODES = 0.96
"""The same where codes are trained behind a round that is held: they take 2 to 4 % more when they may, and lower the error more than as many bytes of weights (bench/LOG.md)."""
MOST_SHRUNK = 1.5
"""A file that ends further from its plan than by this ratio says of the next one that it does so by this."""
_STEPS = 40  # of a third or a quarter each: further than any network
START_ERROR = 0.03
"""A first plan may add so much one-shot error, summed over layers: on ResNet-20 that is a 15-fold smaller file, of which ten epochs recover all
but 0.3 points; more by five times what may be lost. A start only: the rounds decide."""


@dataclass(frozen=True)
class Intent:
    """`value`: bytes of the file, points of top-1, or lambda."""

    kind: Kind
    value: float

    @classmethod
    def of(cls, config: Config, bytes_before: int) -> Intent:
        """What the configuration wants of a network of `bytes_before` bytes."""
        if config.tradeoff is not None:
            return cls("tradeoff", config.tradeoff)
        if config.target_bytes is not None:
            return cls("bytes", config.target_bytes)
        if config.target_ratio is not None:
            return cls("bytes", max(1, math.floor(bytes_before / config.target_ratio)))
        return cls("max_drop", config.max_drop or 0.0)

    def words(self) -> str:
        """The promise, as a person would say it."""
        if self.kind == "bytes":
            return f"at most {self.value:,.0f} bytes"
        if self.kind == "max_drop":
            return f"at most {self.value:g} points of top-1 below the reference on validation images"
        return f"lambda {self.value:g}"


@dataclass(frozen=True)
class Drop:
    """Top-1 of the reference less that of the file on the same `n` validation images, in points, with its paired 95 % interval.

    Of several rounds one is chosen on the same images, which the interval does not know.
    """

    points: float
    low: float
    high: float
    n: int

    @property
    def error(self) -> float:
        """The standard error of the difference, in points."""
        return (self.high - self.low) / (2 * _Z95)

    def words(self) -> str:
        """What becomes of top-1, with its interval: less than 0 is lost."""
        return f"{0 - self.points:+.2f} points (95 %: {0 - self.high:+.2f} to {0 - self.low:+.2f})"

    @classmethod
    def between(
        cls, reference: npt.NDArray[np.int64], found: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]
    ) -> Drop:
        """Of two arrays of predicted classes, int64 (n,); the interval is that of Agresti and Min 2005: half an image more in each of the four
        cells, so that few differing images do not look like certainty."""
        right, also = reference == labels, found == labels
        n, lost, gained = len(labels), int((right & ~also).sum()), int((also & ~right).sum())
        total, down, up = n + 2, lost + 0.5, gained + 0.5
        middle = (down - up) / total
        half = _Z95 * math.sqrt(down + up - (down - up) ** 2 / total) / total
        low, high = (
            max(middle - half, -1.0),
            min(middle + half, 1.0),
        )  # of few images the formula knows no bounds
        return cls(100 * (lost - gained) / n, 100 * low, 100 * high, n)


@dataclass(frozen=True)
class Outcome:
    """What one round gave: the bytes of the file that it was asked for (None: by lambda), those predicted before training, those of the file, its drop,
    training epochs so far; `scale`: of the planned weights, those that were kept to hold the size."""

    requested: int | None
    predicted: int
    bytes: int
    drop: Drop
    epochs: int
    scale: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """A JSON object for the manifest."""
        return {
            "requested_bytes": self.requested, "predicted_bytes": self.predicted, "bytes": self.bytes, "drop_points": self.drop.points,
            "drop_low_points": self.drop.low, "drop_high_points": self.drop.high, "epochs": self.epochs, "kept_scale": self.scale,
        }  # fmt: skip


def keeps(intent: Intent, outcome: Outcome) -> bool:
    """Whether a round keeps the promise: as measured, not as sure; the interval stands beside it."""
    if intent.kind == "bytes":
        return outcome.bytes <= intent.value
    return intent.kind == "tradeoff" or outcome.drop.points <= intent.value + 1e-9


def best(intent: Intent, outcomes: Sequence[Outcome]) -> int:
    """The number of the round to commit: of those that keep the promise the smallest file, or where a size is promised the one that loses least; else
    the one that is closest to it."""
    kept = [index for index, outcome in enumerate(outcomes) if keeps(intent, outcome)]
    if kept and intent.kind == "bytes":
        return min(kept, key=lambda index: (outcomes[index].drop.points, outcomes[index].bytes))
    if kept:
        return min(kept, key=lambda index: (outcomes[index].bytes, outcomes[index].drop.points))
    if intent.kind == "bytes":
        return min(range(len(outcomes)), key=lambda index: outcomes[index].bytes)
    return min(range(len(outcomes)), key=lambda index: (outcomes[index].drop.points, outcomes[index].bytes))


def may_add(intent: Intent) -> float:
    """The one-shot error, summed over layers, that may do for a first round of a promised drop; as a fraction."""
    return START_ERROR + 5 * intent.value / 100


def harmless(intent: Intent, chosen: Callable[[float], T], error: Callable[[T], float]) -> T:
    """What is `chosen` at the largest lambda whose one-shot `error` may do for a first round; where even the mildest has more, that."""
    allowed = may_add(intent)
    mildest, *others = map(float, np.geomspace(1e-4, 1e6, 200))
    found = chosen(mildest)
    for tradeoff in others:
        if error(one := chosen(tradeoff)) <= allowed:
            found = one
    return found


def rung_sizes(first: int, last: int, rungs: int) -> tuple[int, ...]:
    """The bytes of the file that each of `rungs` rounds is asked for, from `first` to `last` in equal ratios; `last` alone where it is no smaller."""
    if rungs < 2 or first <= last:
        return (last,)
    steps = (first * (last / first) ** (number / (rungs - 1)) for number in range(rungs - 1))
    return (*(math.floor(one) for one in steps), last)


def codes_follow(config: Config) -> bool:
    """Whether codes that are trained behind a round may take bytes that it leaves."""
    return config.hold_size and config.level_epochs > 0


def to_ask(intent: Intent, codes: bool = False) -> int:
    """The bytes to ask a round for that is to keep a promised size; `codes`: where codes that are trained behind it take some, too."""
    return max(1, math.floor(intent.value * (SPARE_FOR_CODES if codes else SPARE)))


def before_training(requested: int, last: Outcome | None) -> int:
    """The bytes to plan for a file of `requested` bytes: units that die and codes that fall together while a network is trained make it smaller, as seen in
    the round before."""
    if last is None:
        return requested
    # of a round that was held, what it would have been: bytes grow by about the square root of the weights that are kept; far off, no more than a direction
    shrunk = min(MOST_SHRUNK, max(1 / MOST_SHRUNK, last.predicted * math.sqrt(last.scale) / last.bytes))
    return max(1, math.floor(requested * shrunk))


def next_request(intent: Intent, outcomes: Sequence[Outcome], rounds: int, codes: bool = False) -> int | None:
    """The bytes of the file to ask the next round for, after at least one; None where the rounds are over. `codes`: as in `to_ask`."""
    if len(outcomes) >= rounds or intent.kind == "tradeoff":
        return None
    last = outcomes[-1]
    if intent.kind == "bytes":
        return None if keeps(intent, last) else to_ask(intent, codes)
    kept = [outcome.bytes for outcome in outcomes if keeps(intent, outcome)]
    broken = [outcome.bytes for outcome in outcomes if not keeps(intent, outcome)]
    if not broken:
        return math.floor(min(kept) * SMALLER)
    if not kept:
        return math.ceil(max(broken) * LARGER)
    # a larger file that broke the promise says nothing of smaller ones: noise, or a round that was trained less
    below = [size for size in broken if size < min(kept)]
    if not below:
        return math.floor(min(kept) * SMALLER)
    if min(kept) <= CLOSE * max(below):
        return None
    return math.floor(math.sqrt(min(kept) * max(below)))


def sizes_on(intent: Intent, outcomes: Sequence[Outcome], requested: int) -> Iterator[int]:
    """`requested` bytes, and the sizes further on that are asked for where its plan was tried already: while all sizes so far lie on one side of the promise. Behind that a
    step would lead out of what lies between a kept and a broken one, where nothing can win; and a promised size asks for itself again."""
    yield requested
    sides = {keeps(intent, outcome) for outcome in outcomes}
    if intent.kind != "max_drop" or len(sides) != 1:
        return
    for _ in range(_STEPS):
        requested = max(1, math.ceil(requested * (SMALLER if True in sides else LARGER)))
        yield requested
