"""Where a search looks: the lambdas that its steps take turns over, and where the first points of every layer lie, both by the size that is wanted.

The lambda that meets a size is found afterwards from the measured points (`choice`), so a search must only have looked near it. Not covered: how a point is suggested
and measured (`search`).
"""

from __future__ import annotations

from dataclasses import dataclass

from clipq_ray.config import Config
from clipq_ray.intent import Intent

LADDER = (2.0, 8.0, 32.0)
"""The lambdas that share a search: around them lie the choices for 16- to 40-fold smaller networks (measured on
ResNet-20 and LeNet-5). Every measured point stays open to every lambda, so a user's own lambda among them needs no other search."""

STEEP = (128.0, 512.0)
"""Further ones where a file is to be more than `STEEP_RATIO` times smaller: there the choices of one run lie between 3 and 330 (bench/LOG.md)."""

STEEP_RATIO = 160.0
"""Up to this ratio `LADDER` suffices."""

MILD = (0.25, 1.0, 4.0)
"""The lambdas where a file is to be less than `MILD_RATIO` times smaller: the choices of ResNet-20 lie below 1.1 there (bench/LOG.md)."""

MILD_RATIO = 12.0
"""From this ratio on `LADDER` suffices."""

LEAST_RATIO = 5.0
"""Below it all first points would be the mildest that there are: b = 8 and next to no pruning, 4.4 to 5.2 times smaller (three layers of ResNet-20)."""

START = (0.25, 0.05, 0.1, 0.5, 0.75, 0.02, 0.9, 0.35, 0.17, 0.01)
"""The first points of every layer, from the curves that cost no evaluation: for each of these shares of the weights' energy that may be
lost, the point that saves the most; further ones are drawn at random."""

START_RATIO = 16.0
"""For networks that are to be so many times smaller and more; for others the shares are smaller (`shares`)."""

START_AGAIN = (0.0, 0.25, 0.1, 0.5, 0.05, 0.75, 0.02, 0.9, 0.35, 0.17)
"""The same where a network is searched that is compressed already: the share is that of the weights as they are, and the first point moves them least."""


@dataclass(frozen=True)
class Aim:
    """`tradeoffs`: the lambdas that steps take turns over; `start`: the share of the weights' energy that each of the first points of a layer may lose."""

    tradeoffs: tuple[float, ...] = LADDER
    start: tuple[float, ...] = START

    @classmethod
    def at(cls, ratio: float) -> Aim:
        """For a network that is to be `ratio` times smaller."""
        return cls(ladder(ratio), shares(ratio))

    @classmethod
    def again(cls, ratio: float) -> Aim:
        """The same for one that is compressed already."""
        return cls(ladder(ratio), START_AGAIN)

    @classmethod
    def of(cls, config: Config, bytes_before: int, together: float | None = None) -> Aim:
        """Of the search before all rounds of a network of `bytes_before` bytes; `together`: how many times smaller the ensemble is to be that decides for it, if one does
        and that is known."""
        if together is not None:
            return cls.at(together)
        intent = Intent.of(config, bytes_before)
        if intent.kind == "tradeoff":
            steep, mild = intent.value > max(LADDER), intent.value < min(LADDER)
            return cls(LADDER + STEEP) if steep else cls.at(MILD_RATIO / 2) if mild else cls()
        if intent.kind != "bytes":
            return cls()
        aim = cls.at(bytes_before / intent.value)
        # further searches, on the way to a size, serve what is steep
        return cls(LADDER) if config.rungs > 1 and config.search_again and aim.start == START else aim


def ladder(ratio: float) -> tuple[float, ...]:
    """The lambdas for a network that is to be `ratio` times smaller: where files are so many times smaller, the same share of a file is so many times fewer
    of the network's bits, and lambda, which prices these, so much larger for the layers that have most of what is left."""
    if ratio < MILD_RATIO:
        return MILD
    return LADDER if ratio <= STEEP_RATIO else LADDER + STEEP


def shares(ratio: float) -> tuple[float, ...]:
    """`START`; of a network that is to be less than `START_RATIO` times smaller by as much less as a normal source loses less at 32/`ratio` bits a weight: a fourth for each bit
    (rate-distortion theory: D = 4^-R)."""
    further = max(0.0, 32 / max(ratio, LEAST_RATIO) - 32 / START_RATIO)
    return tuple(share * 4**-further for share in START)
