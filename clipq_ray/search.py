"""The search: theta = (p, b) of every layer by Bayesian optimization, before fine-tuning.

For each layer by itself, all others at full precision, one shot: minimise eps(theta) - lambda * c(theta), where eps is the top-1 error on
a subset of the training images and c the bits saved on the layer over the network's bits (method: CLIP-Q, section 3.2). The size is
what the codec really writes for the layer. What a point saves and how far it moves the weights is known before it is measured, from the
quantizer and the encoder alone; the first points come from there, and only the error is modelled (`acquisition`). Expected improvement is
maximised over the grid of all b and of p in steps of 0.01, so no point is measured twice; a layer may end when too little of it is left. One
suggestion is a pure function of (seed, layer, step, points so far, weights): a search that was cut off goes on as if it had not been.

With a target ratio, steps take turns over a ladder of lambdas, and the lambda that meets the target is found afterwards from the
measured points (`choose`); error and size per point do not depend on lambda. Not covered: how evaluations are made cheap (`prefix`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from clipq_ray import codec, seeds
from clipq_ray.acquisition import Candidates, Point, propose, start_point
from clipq_ray.data import Split
from clipq_ray.plan import BITS_MAX, BITS_MIN, Theta
from clipq_ray.prefix import LayerScores
from clipq_ray.quantizer import decide_share, quantize

LADDER = (2.0, 8.0, 32.0)
"""The lambdas that share a search with a target ratio: around them lie the choices for 8- to 40-fold smaller networks (measured on
ResNet-20 and LeNet-5; every measured point stays open to every lambda)."""

START = (0.25, 0.05, 0.1, 0.5, 0.75, 0.02, 0.9, 0.35, 0.17, 0.01)
"""The first points of every layer, from the curves that cost no evaluation: for each of these shares of the weights' energy that may be
lost, the point that saves the most; further ones are drawn at random."""

GRID = tuple(Theta(step / 100, b) for b in range(BITS_MIN, BITS_MAX + 1) for step in range(100))

ANCHORS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""The p at which size and distortion of a layer are computed for every b, from about `SAMPLE` weights; between them they are interpolated."""

SAMPLE = 1 << 18


@dataclass(frozen=True)
class Settings:
    """How one layer is searched; `tradeoffs` are the lambdas that steps take turns over.

    A layer ends before `evaluations` when at no lambda a further one is expected to lower the objective by as much as an error on `stop_gain`
    images would raise it; 0 switches that off. `loss_share`: how far the loss stands for the error in the model; 0 leaves the paper's eps.
    """

    evaluations: int
    start: int
    tradeoffs: tuple[float, ...]
    seed: int
    stop_gain: float = 0.0
    loss_share: float = 0.5


@dataclass(frozen=True)
class Trial:
    """One measured point of one layer; `error` and `loss` with only this layer compressed, `saved` = c(theta).

    `predicted_mean` and `predicted_deviation`: the objective at `tradeoff` as the model saw it before; None for start points.
    """

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
    predicted_mean: float | None = None
    predicted_deviation: float | None = None

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


@dataclass(frozen=True)
class Suggestion:
    """The next point of a layer; `origin` is "start" or "bayes"; the prediction as in `Trial`; `gain` the largest expected improvement."""

    theta: Theta
    origin: str
    tradeoff: float
    mean: float | None = None
    deviation: float | None = None
    gain: float | None = None


def suggest(trials: Sequence[Trial], layer: str, settings: Settings, known: Candidates) -> Suggestion:
    """The next point of `layer`, none of those measured; `known` are all points and what is known of them without the network."""
    step = len(trials)
    measured = {trial.theta for trial in trials}
    free = known.without(measured)
    turn = step % len(settings.tradeoffs)
    seed = seeds.derive(settings.seed, "search", layer, step)
    if step < settings.start:
        fixed = start_point(free, START[step]) if step < len(START) else seed % len(free.thetas)
        return Suggestion(free.thetas[fixed], "start", settings.tradeoffs[turn])
    place = {theta: index for index, theta in enumerate(known.thetas)}
    points = [
        Point(t.theta, t.error, t.loss, t.images, t.saved, float(known.distortion[place[t.theta]]))
        for t in trials
    ]
    found = propose(points, free, settings.tradeoffs, turn, settings.loss_share, seed)
    return Suggestion(
        free.thetas[found.index], "bayes", found.tradeoff, found.mean, found.deviation, found.gain
    )


def exhausted(suggestion: Suggestion, trials: Sequence[Trial], settings: Settings) -> bool:
    """Whether a layer ends before its last evaluation: what `suggestion` may gain is not worth measuring."""
    return suggestion.gain is not None and suggestion.gain * trials[0].images < settings.stop_gain


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
        self._known: dict[str, Candidates] = {}

    @torch.no_grad()
    def known(self, layer: str) -> Candidates:
        """What is known of `layer` on the grid without the network; computed once. Of a large layer only every k-th row is coded."""
        if layer not in self._known:
            full = self._model.get_parameter(layer).detach()
            rows = full[:: max(1, round(full.numel() / SAMPLE))]
            self._known[layer] = _curves(rows, full.numel(), self._network_bytes, self._size)
        return self._known[layer]

    @torch.no_grad()
    def measure(
        self, layer: str, theta: Theta, *, step: int, origin: str, tradeoff: float,
        mean: float | None = None, deviation: float | None = None,
    ) -> Trial:  # fmt: skip
        """Error, loss and size with only `layer` compressed by `theta`; `mean` and `deviation` are what was predicted."""
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
            predicted_mean=mean,
            predicted_deviation=deviation,
        )


def _curves(
    weights: torch.Tensor, elements: int, network_bytes: int, size: Callable[[codec.CodedLayer], int]
) -> Candidates:
    """Size and distortion on the grid, `weights` standing for all `elements` of a layer."""
    energy = max(float(weights.double().square().sum()), 1e-300)
    rates = [step / 100 for step in range(100)]
    saved, distortion = [], []
    for b in range(BITS_MIN, BITS_MAX + 1):
        sizes, lost = [], []
        for p in ANCHORS:
            share = decide_share(weights, Theta(p, b))
            quantized = quantize(weights, Theta(p, b), share)
            sizes.append(size(codec.coded(quantized, share)) * elements / weights.numel())
            lost.append(float((weights - quantized.values).double().square().sum()) / energy)
        saved.append((4 * elements - np.interp(rates, ANCHORS, sizes)) / network_bytes)
        distortion.append(np.interp(rates, ANCHORS, lost))
    return Candidates(GRID, np.concatenate(saved), np.concatenate(distortion))


def step_layer(
    evaluator: LayerEvaluator, layer: str, trials: list[Trial], settings: Settings
) -> Trial | None:
    """One suggestion and its measurement, appended to `trials`; None where the layer ends before its last evaluation (`exhausted`)."""
    found = suggest(trials, layer, settings, evaluator.known(layer))
    if exhausted(found, trials, settings):
        return None
    trial = evaluator.measure(
        layer, found.theta, step=len(trials), origin=found.origin, tradeoff=found.tradeoff,
        mean=found.mean, deviation=found.deviation,
    )  # fmt: skip
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
