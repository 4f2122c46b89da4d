"""The search: theta = (p, b) of every layer by Bayesian optimization, before fine-tuning.

For each layer by itself, all others at full precision, one shot: minimise eps(theta) - lambda * c(theta), where eps is the top-1 error on
a subset of the training images and c the bits saved on the layer over the network's bits (method: CLIP-Q, section 3.2). The size is
what the codec really writes for the layer. A Gaussian process (Matern 5/2) models the objective on the measured points; expected
improvement is maximised over the grid of all b and of p in steps of 0.01, so no point is measured twice. One suggestion is a pure
function of (seed, layer, step, points so far): a search that was cut off goes on as if it had not been.

With a target ratio, steps take turns over a ladder of lambdas, and the lambda that meets the target is found afterwards from the
measured points (`choose`); error and size per point do not depend on lambda. Not covered: how evaluations are made cheap (`prefix`).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from bayes_opt import BayesianOptimization
from bayes_opt.acquisition import ExpectedImprovement
from sklearn.gaussian_process.kernels import Matern
from torch import nn

from clipq_ray import codec, seeds
from clipq_ray.data import Split
from clipq_ray.plan import BITS_MAX, BITS_MIN, Theta
from clipq_ray.prefix import LayerScores
from clipq_ray.quantizer import decide_share, quantize

LADDER = (2.0, 8.0, 32.0)
"""The lambdas that share a search with a target ratio: around them lie the choices for 8- to 40-fold smaller networks (measured on
ResNet-20 and LeNet-5; every measured point stays open to every lambda)."""

START = ((0.6, 2), (0.5, 3), (0.8, 3), (0.3, 4), (0.9, 4), (0.1, 6), (0.7, 2), (0.95, 4), (0.4, 3), (0.2, 2))
"""The first points of every layer: from mild to hard along the useful diagonal; further ones are drawn at random."""

GRID = tuple(Theta(step / 100, b) for b in range(BITS_MIN, BITS_MAX + 1) for step in range(100))


@dataclass(frozen=True)
class Settings:
    """How one layer is searched; `tradeoffs` are the lambdas that steps take turns over."""

    evaluations: int
    start: int
    tradeoffs: tuple[float, ...]
    seed: int


@dataclass(frozen=True)
class Trial:
    """One measured point of one layer; `error` and `loss` with only this layer compressed, `saved` = c(theta)."""

    layer: str
    step: int
    origin: str
    p: float
    b: int
    images: int
    error: float
    loss: float
    bytes: int
    saved: float
    tradeoff: float
    seconds: float
    node: str

    @property
    def theta(self) -> Theta:
        """The point itself."""
        return Theta(self.p, self.b)

    def objective(self, tradeoff: float) -> float:
        """The value that is minimised at lambda = `tradeoff`."""
        return self.error - tradeoff * self.saved

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def suggest(trials: Sequence[Trial], layer: str, settings: Settings) -> tuple[Theta, str]:
    """The next point of `layer` and where it comes from ("start" or "bayes")."""
    step = len(trials)
    measured = {trial.theta for trial in trials}
    if step < settings.start:
        if step < len(START):
            return Theta(*START[step]), "start"
        free = [theta for theta in GRID if theta not in measured and theta not in {Theta(*s) for s in START}]
        return free[seeds.derive(settings.seed, "search", layer, step) % len(free)], "start"
    tradeoff = settings.tradeoffs[step % len(settings.tradeoffs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # typed parameters are announced as experimental every time
        optimizer = BayesianOptimization(
            f=None,
            pbounds={"p": (0.0, 0.99), "b": (BITS_MIN, BITS_MAX, int)},
            acquisition_function=ExpectedImprovement(xi=0.0),
            random_state=seeds.derive(settings.seed, "search", layer, step) % 2**32,
            verbose=0,
            allow_duplicate_points=True,
        )
    # one length for each axis, in units of p and of bits; errors of a few images are the noise
    optimizer.set_gp_params(
        kernel=Matern(length_scale=[0.3, 2.0], nu=2.5), alpha=1e-4, n_restarts_optimizer=1
    )
    for trial in trials:
        optimizer.register(params={"p": trial.p, "b": trial.b}, target=-trial.objective(tradeoff))
    free = [theta for theta in GRID if theta not in measured]
    mean, deviation = optimizer.predict([{"p": theta.p, "b": theta.b} for theta in free], return_std=True)
    acquisition = optimizer.acquisition_function
    acquisition.y_max = max(-trial.objective(tradeoff) for trial in trials)
    gain = acquisition.base_acq(np.asarray(mean), np.maximum(np.asarray(deviation), 1e-12))
    return free[int(np.argmax(gain))], "bayes"


class LayerEvaluator:
    """Measures points of a network's layers; the network's weights are as before after every call.

    `images` is the subset that scores; `network_bytes` is 4 x all elements that inference reads; `size` gives the bytes of a layer in the file;
    `cache_bytes` is what is kept of the network before a layer (`prefix`).
    """

    def __init__(
        self,
        model: nn.Module,
        images: Split,
        network_bytes: int,
        *,
        batch_size: int,
        device: torch.device,
        node: str,
        size: Callable[[codec.CodedLayer], int] = codec.layer_bytes,
        cache_bytes: int = 0,
    ) -> None:
        self._size = size
        self._scores = LayerScores(model.to(device), images, batch_size, device, cache_bytes)
        self._model, self._images, self._network_bytes = model.to(device), images, network_bytes
        self._node = node

    @torch.no_grad()
    def measure(self, layer: str, theta: Theta, *, step: int, origin: str, tradeoff: float) -> Trial:
        """Error, loss and size with only `layer` compressed by `theta`."""
        started = time.monotonic()
        parameter = self._model.get_parameter(layer)
        full = parameter.detach().clone()
        share = decide_share(full, theta)
        quantized = quantize(full, theta, share)
        size = self._size(codec.coded(quantized, share))
        try:
            parameter.copy_(quantized.values)
            result = self._scores.evaluate(layer)
        finally:
            parameter.copy_(full)
        return Trial(
            layer=layer,
            step=step,
            origin=origin,
            p=theta.p,
            b=theta.b,
            images=result.n,
            error=1.0 - result.top1,
            loss=result.loss,
            bytes=size,
            saved=(4 * full.numel() - size) / self._network_bytes,
            tradeoff=tradeoff,
            seconds=time.monotonic() - started,
            node=self._node,
        )


def step_layer(evaluator: LayerEvaluator, layer: str, trials: list[Trial], settings: Settings) -> Trial:
    """One suggestion and its measurement; appended to `trials`."""
    theta, origin = suggest(trials, layer, settings)
    tradeoff = settings.tradeoffs[len(trials) % len(settings.tradeoffs)]
    trial = evaluator.measure(layer, theta, step=len(trials), origin=origin, tradeoff=tradeoff)
    trials.append(trial)
    return trial


@dataclass(frozen=True)
class Choice:
    """A point for every layer at one lambda, and the bytes that the layers take together before fine-tuning."""

    tradeoff: float
    trials: Mapping[str, Trial]

    @property
    def bytes(self) -> int:
        """Sum over layers, as the codec writes them."""
        return sum(trial.bytes for trial in self.trials.values())


def choose(trials: Mapping[str, Sequence[Trial]], tradeoff: float) -> Choice:
    """The measured points that minimise the objective at lambda = `tradeoff`; of equals the smallest."""
    return Choice(
        tradeoff,
        {
            layer: min(points, key=lambda t: (t.objective(tradeoff), t.bytes, t.step))
            for layer, points in trials.items()
        },
    )


def choose_for_bytes(trials: Mapping[str, Sequence[Trial]], budget: int) -> Choice:
    """The smallest lambda whose choice takes at most `budget` bytes; the largest lambda's where none does."""
    low, high = 1e-4, 1e6
    best = choose(trials, high)
    if best.bytes > budget:
        return best
    for _ in range(60):
        middle = (low * high) ** 0.5
        choice = choose(trials, middle)
        if choice.bytes <= budget:
            best, high = choice, middle
        else:
            low = middle
    return _fill(best, trials, budget)


def _fill(choice: Choice, trials: Mapping[str, Sequence[Trial]], budget: int) -> Choice:
    """Spend what a jump between two lambdas leaves of the budget: the most error removed per byte first."""
    chosen = dict(choice.trials)
    left = budget - choice.bytes
    while True:
        steps = [
            ((chosen[layer].error - point.error) / max(point.bytes - chosen[layer].bytes, 1), layer, point)
            for layer, points in trials.items()
            for point in points
            if point.error < chosen[layer].error and point.bytes - chosen[layer].bytes <= left
        ]
        if not steps:
            return Choice(choice.tradeoff, chosen)
        _, layer, point = max(steps, key=lambda step: (step[0], -step[2].step))
        left -= point.bytes - chosen[layer].bytes
        chosen[layer] = point
