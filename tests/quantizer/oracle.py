"""The operator once more, straight from the definition: slow, in Python's exact fractions, shares no code with the package."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from clipq_ray.plan import Share, Theta


@dataclass(frozen=True)
class Expected:
    codes: list[int]
    means: dict[int, Fraction]  # exact means of the non-empty intervals
    levels: dict[int, float]  # what the definition makes of them, to the bit
    clips: tuple[float, float]
    share: Share


def _clip(magnitudes: list[float], p: float) -> float:
    k = math.floor(p * len(magnitudes) + 0.5)
    return sorted(magnitudes)[k - 1] if k else 0.0


def _share(lengths: tuple[float, float], intervals: int) -> Share:
    negative, positive = lengths
    if not negative or not positive:
        return Share(intervals * bool(negative), intervals * bool(positive))
    wanted = math.floor(intervals * positive / (negative + positive) + 0.5)
    wanted = min(max(1, wanted), intervals - 1)
    return Share(intervals - wanted, wanted)


def _edge(j: int, clip: float, largest: float, intervals: int) -> float:
    return largest if j == intervals else float(np.float32(clip + (largest - clip) * (j / intervals)))


def _level(group: list[Fraction], t: int, below: float, edge: float) -> float:
    """Step 4 for magnitudes in (below, edge]; `round` of a fraction takes ties to even."""
    total = sum(round(magnitude * Fraction(2) ** t) for magnitude in group)
    level = np.float32(math.ldexp(float(total) / len(group), -t))
    return float(min(max(level, np.nextafter(np.float32(below), np.float32(np.inf))), np.float32(edge)))


def _code(magnitude: float, clip: float, largest: float, intervals: int) -> int:
    if magnitude <= clip or intervals == 0:
        return 0
    for j in range(1, intervals):
        if magnitude <= _edge(j, clip, largest, intervals):
            return j
    return intervals


def expected(weights: npt.NDArray[np.float32], theta: Theta, share: Share | None = None) -> Expected:
    """Codes, exact means, clips and share of float32 (n,)."""
    row = [float(w) for w in weights]
    sides = [-w for w in row if w < 0], [w for w in row if w > 0]
    clips = _clip(sides[0], theta.p), _clip(sides[1], theta.p)
    largest = max(sides[0], default=0.0), max(sides[1], default=0.0)
    share = share or _share((largest[0] - clips[0], largest[1] - clips[1]), 2**theta.b - 1)
    codes = [
        _code(w, clips[1], largest[1], share.positive)
        if w > 0
        else -_code(-w, clips[0], largest[0], share.negative)
        for w in row
    ]
    members: dict[int, list[Fraction]] = {}
    for w, code in zip(row, codes, strict=True):
        members.setdefault(code, []).append(Fraction(w))
    members.pop(0, None)
    means = {code: sum(group, Fraction(0)) / len(group) for code, group in members.items()}
    t = 62 - len(row).bit_length() - math.frexp(max(largest))[1]
    levels = {}
    for code, group in members.items():
        side, j, sign = int(code > 0), abs(code), 1 if code > 0 else -1
        axis = clips[side], largest[side], (share.negative, share.positive)[side]
        levels[code] = sign * _level([sign * w for w in group], t, _edge(j - 1, *axis), _edge(j, *axis))
    return Expected(codes, means, levels, clips, share)
