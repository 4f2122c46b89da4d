"""Which point of a layer to measure next: a model of the error, and the expected improvement of the objective.

What a layer saves at a theta and how far its weights move (`Candidates`) are known without the network; only the error has to be modelled. The
arcsine of its square root has the same noise wherever it lies, 1/(4 n) for n images, so the noise is known. It is modelled as a line in the
relative distance of the quantized weights from the full ones, |w - q| / |w|, plus a Gaussian process (Matern 5/2) in (p, b), p real and b an
integer. The loss of the same evaluations steadies the error: a share of the modelled value is the error as a line in the loss.
Best measured points and improvements are those of the error alone. Everything is a pure function of its arguments. Not covered:
measuring, how many start points, when a layer ends (`search`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from clipq_ray.plan import BITS_MAX, BITS_MIN, Theta

Vector = npt.NDArray[np.float64]

_BEND = 0.95
"""The pruning rate from which on a step counts by the share of the remaining weights that it takes."""

_MOST = 0.9999  # beyond the grid

LENGTHS = (0.3, 3.0)
LENGTH_BOUNDS = ((0.1, 1.0), (1.0, 8.0))
"""In units of p (`stretched_rate`) and of bits: where a fit to a few points begins and must stay."""


class Point(NamedTuple):
    """A measured point; `saved` = c(theta), `distortion` = |w - q|^2 / |w|^2."""

    theta: Theta
    error: float
    loss: float
    images: int
    saved: float
    distortion: float


@dataclass(frozen=True)
class Candidates:
    """Points that may be measured, and what is known of them without the network."""

    thetas: tuple[Theta, ...]
    saved: Vector
    distortion: Vector

    def of(self, theta: Theta) -> float:
        """The distortion of one of them."""
        return float(self.distortion[self._places[theta]])

    @cached_property
    def _places(self) -> dict[Theta, int]:
        return {theta: index for index, theta in enumerate(self.thetas)}

    def without(self, measured: Collection[Theta]) -> Candidates:
        """Those that are not in `measured`."""
        kept = [index for index, theta in enumerate(self.thetas) if theta not in measured]
        return Candidates(
            tuple(self.thetas[index] for index in kept), self.saved[kept], self.distortion[kept]
        )


@dataclass(frozen=True)
class Proposal:
    """A candidate's index, the predicted objective there at `tradeoff`, and the largest expected improvement over all lambdas and candidates."""

    index: int
    tradeoff: float
    mean: float
    deviation: float
    gain: float


def start_point(free: Candidates, most: float) -> int:
    """The candidate that saves the most of those that lose at most a share `most` of the weights' energy; the mildest if none does."""
    allowed = free.distortion <= most
    if not allowed.any():
        return int(np.argmin(free.distortion))
    return int(np.argmax(np.where(allowed, free.saved, -np.inf)))


def propose(
    points: Sequence[Point], free: Candidates, tradeoffs: Sequence[float], turn: int, loss_share: float, seed: int
) -> Proposal:  # fmt: skip
    """The candidate of the largest expected improvement at the lambda whose turn it is."""
    mean, deviation = predicted_error(points, free, loss_share, seed)
    gains = np.array([_gain(points, free, mean, deviation, tradeoff) for tradeoff in tradeoffs])
    index = int(np.argmax(gains[turn]))
    objective = float(mean[index] - tradeoffs[turn] * free.saved[index])
    return Proposal(index, tradeoffs[turn], objective, float(deviation[index]), float(gains.max()))


def _gain(
    points: Sequence[Point], free: Candidates, mean: Vector, deviation: Vector, tradeoff: float
) -> Vector:
    """Expected improvement on the best measured objective at every candidate."""
    # here and below: half a second that a training does not need
    from bayes_opt.acquisition import ExpectedImprovement

    acquisition = ExpectedImprovement(xi=0.0)
    acquisition.y_max = max(tradeoff * point.saved - point.error for point in points)
    gain: Vector = acquisition.base_acq(tradeoff * free.saved - mean, np.maximum(deviation, 1e-12))
    return gain


def predicted_error(
    points: Sequence[Point], free: Candidates, loss_share: float, seed: int
) -> tuple[Vector, Vector]:
    """Mean and standard deviation of the top-1 error at every candidate."""
    noise = np.array([0.25 / point.images for point in points])
    values = _stretch(np.array([point.error for point in points]))
    if loss_share:
        # 1 - exp(-loss) lies in [0, 1] like an error, but never stands still
        losses = np.nan_to_num([point.loss for point in points], nan=np.inf, posinf=np.inf)
        pilot = _stretch(1.0 - np.exp(-losses))
        intercept, slope = _line(pilot, values, noise)
        values = (1.0 - loss_share) * values + loss_share * (intercept + slope * pilot)
    far, wanted = (np.sqrt(given) for given in ([point.distortion for point in points], free.distortion))
    intercept, slope = _line(far, values, noise)
    thetas = [point.theta for point in points]
    mean, deviation = _process(thetas, values - intercept - slope * far, noise, free.thetas, seed)
    return _relax(intercept + slope * wanted + mean, deviation)


def _stretch(rate: Vector) -> Vector:
    """arcsin(sqrt(rate)): binomial noise of 1/(4 n) at any rate."""
    result: Vector = np.arcsin(np.sqrt(np.clip(rate, 0.0, 1.0)))
    return result


def _relax(mean: Vector, deviation: Vector) -> tuple[Vector, Vector]:
    """The mirror of `_stretch` for a normal value: exact mean of sin^2, deviation by its slope and its curvature."""
    # E sin^2(x) = (1 - cos(2m) exp(-2 s^2)) / 2, and the same with doubled angles for the square
    shrink = np.exp(-2 * deviation**2)
    first = (1 - np.cos(2 * mean) * shrink) / 2
    spread = (1 + np.cos(4 * mean) * shrink**4) / 2 - (np.cos(2 * mean) * shrink) ** 2
    return first, np.sqrt(np.maximum(spread, 0.0)) / 2


def _line(x: Vector, y: Vector, noise: Vector) -> tuple[float, float]:
    """Intercept and slope of y over x, ridge towards y = x."""
    weight = 1.0 / noise
    ridge = np.diag([1e-3, 1e-3]) * weight.sum()
    design = np.stack([np.ones_like(x), x], axis=1)
    left = design.T @ (design * weight[:, None]) + ridge
    right = design.T @ (weight * y) + ridge @ np.array([0.0, 1.0])
    intercept, slope = np.linalg.solve(left, right)
    return float(intercept), float(slope)


def _process(
    thetas: Sequence[Theta], values: Vector, noise: Vector, wanted: Sequence[Theta], seed: int
) -> tuple[Vector, Vector]:
    """Posterior of a Gaussian process (Matern 5/2, p real, stretched near 1, and b an integer) at `wanted`, noise known."""
    from bayes_opt import BayesianOptimization
    from bayes_opt.acquisition import ExpectedImprovement
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # typed parameters announce themselves every time; lengths may end at a bound
        optimizer = BayesianOptimization(
            f=None,
            pbounds={"p": (0.0, stretched_rate(_MOST)), "b": (BITS_MIN, BITS_MAX, int)},
            acquisition_function=ExpectedImprovement(xi=0.0),
            random_state=seed % 2**32,
            verbose=0,
            allow_duplicate_points=True,
        )
        # two values went into the line; a few points that happen to lie on it must not pass for certainty
        freedom = len(values) / max(len(values) - 2, 1)
        scale = max(float(np.mean(values**2)) * freedom, float(noise.mean()))
        kernel = ConstantKernel(scale, (scale / 3, scale * 10)) * Matern(LENGTHS, LENGTH_BOUNDS, nu=2.5)
        optimizer.set_gp_params(kernel=kernel, alpha=noise, n_restarts_optimizer=0, normalize_y=False)
        for theta, value in zip(thetas, values, strict=True):
            optimizer.register(params=_parameters(theta), target=float(value))
        mean, deviation = optimizer.predict([_parameters(theta) for theta in wanted], return_std=True)
    return np.asarray(mean), np.asarray(deviation)


def _parameters(theta: Theta) -> dict[str, Any]:
    return {"p": stretched_rate(theta.p), "b": theta.b}


def stretched_rate(p: float) -> float:
    """The coordinate of a pruning rate in the Gaussian process: itself up to 0.95, from there on logarithmic in what is left, without a kink: from 0.99 to
    0.999 nine of the ten weights that are left go, and that is no small step."""
    left = 1.0 - _BEND
    return p if p <= _BEND else _BEND + left * math.log(left / (1.0 - p))
