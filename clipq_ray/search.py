"""The search: theta = (p, b) of every layer by Bayesian optimization, before fine-tuning.

For each layer by itself, all others at full precision (or, from the weights of a round of fine-tuning, as compressed in it), one shot: minimise eps(theta) - lambda * c(theta), where eps is the top-1 error on
a subset of the training images and c the bits saved on the layer over the network's bits (method: CLIP-Q, section 3.2). The size is
what the codec really writes for the layer. What a point saves and how far it moves the weights is known before it is measured, from the
quantizer and the encoder alone; the first points come from there, and only the error is modelled (`acquisition`). Expected improvement is
maximised over the grid of all b and of p in steps of 0.01, finer near 1, so no point is measured twice; a layer may end when too little of it is left. One
suggestion is a pure function of (seed, layer, step, points so far, weights): a search that was cut off goes on as if it had not been.

Steps take turns over a ladder of lambdas, and the lambda that meets an intent is found afterwards from the measured points (`choice`): error and
size per point do not depend on lambda, so another lambda needs no new evaluation. Layers that share one theta (`groups`) are searched as
one. With `early_stop` there is one lambda, an evaluation ends as soon as it cannot win any more, and its error is a bound that no choice takes.
Not covered: how evaluations are made cheap (`prefix`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from clipq_ray import codec, seeds
from clipq_ray.acquisition import Candidates, Point, propose, start_point
from clipq_ray.aim import START
from clipq_ray.data import Split
from clipq_ray.groups import Group
from clipq_ray.plan import BITS_MAX, BITS_MIN, Theta
from clipq_ray.prefix import LayerScores
from clipq_ray.quantizer import decide_share, quantize

TOO_FAR = 0.1
"""A layer of which no start point is within so much of the original's error [fraction of images] has nowhere to begin from, and looks the same everywhere: it gets
further start points, each of a `MILDER` share of what the mildest one lost, until one is."""
MILDER = 0.1

RATES = (
    *(step / 100 for step in range(96)),
    *(step / 1000 for step in range(952, 990, 2)),
    *(step / 1000 for step in range(990, 995)),
    *(step / 10_000 for step in range(9950, 10_000, 5)),
)
"""In steps of 0.01, and finer ones above 0.95, where a hundredth is a fifth of the weights that are left and more."""
_COARSE = 0.95

ANCHORS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99, 0.995, 0.999)
"""The p at which size and distortion of a layer are computed for every b, from about `SAMPLE` weights; between them they are interpolated."""

SAMPLE = 1 << 18


@dataclass(frozen=True)
class Settings:
    """How one layer is searched; `tradeoffs` are the lambdas that steps take turns over.

    A layer (or a group of them) ends before `evaluations` when at no lambda a further one is expected to lower the objective by as much as an error on `stop_gain`
    images would raise it; 0 switches that off. `loss_share`: how far the loss stands for the error in the model; 0 leaves the paper's eps. `shares`: of the weights' energy,
    what each of the first points may lose; further ones of the `start` are drawn at random.
    `early_stop`: end evaluations that cannot win at the one lambda there is. `again`: the network is compressed already.
    """

    evaluations: int
    start: int
    tradeoffs: tuple[float, ...]
    seed: int
    stop_gain: float = 0.0
    loss_share: float = 0.5
    early_stop: bool = False
    again: bool = False
    shares: tuple[float, ...] = START

    def __post_init__(self) -> None:
        if self.early_stop and len(self.tradeoffs) != 1:
            raise ValueError(f"expected one lambda where evaluations end early, got {self.tradeoffs}")


@dataclass(frozen=True)
class Trial:
    """One measured point of one layer, or of one group of layers; `error` and `loss` with the others as the search has them, `saved` = c(theta).

    `bound`: the evaluation ended after `images` images because it could not win at `tradeoff`; `error` is what it had found by then over all images,
    so at most the true one, and `loss` is the mean over those `images`. `predicted_mean` and `predicted_deviation`: the objective at `tradeoff` as the model saw it before; None for start points.
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
    bound: bool = False

    @property
    def theta(self) -> Theta:
        """The point itself."""
        return Theta(self.p, self.b)

    def measured_error(self, whole: int) -> float:
        """The error on the images that were measured, where `error` is over the `whole`: of a bound, what its images say of all of them."""
        return self.error * whole / self.images

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
        shares = settings.shares
        fixed = start_point(free, shares[step]) if step < len(shares) else seed % len(free.thetas)
        return Suggestion(free.thetas[fixed], "start", settings.tradeoffs[turn])
    whole = trials[0].images  # the first evaluation of a layer has nothing to lose against
    points = [
        Point(t.theta, t.measured_error(whole), t.loss, t.images, t.saved, known.of(t.theta)) for t in trials
    ]
    found = propose(points, free, settings.tradeoffs, turn, settings.loss_share, seed)
    return Suggestion(
        free.thetas[found.index], "bayes", found.tradeoff, found.mean, found.deviation, found.gain
    )


def milder(
    trials: Sequence[Trial], settings: Settings, known: Candidates, original: Callable[[], float]
) -> Suggestion | None:
    """A further start point for a layer whose points are all far from the `original` error; None where one is not, or where nothing milder is left."""
    if settings.again or len(trials) < settings.start:  # one that is compressed already begins where it is
        return None
    whole = trials[0].images
    least = min(trial.measured_error(whole) for trial in trials)
    if least < TOO_FAR or least < original() + TOO_FAR:
        return None
    lost = min(known.of(trial.theta) for trial in trials)
    free = known.without({trial.theta for trial in trials})
    chosen = start_point(free, MILDER * lost)
    if free.distortion[chosen] >= lost:
        return None
    return Suggestion(free.thetas[chosen], "start", settings.tradeoffs[len(trials) % len(settings.tradeoffs)])


def exhausted(suggestion: Suggestion, trials: Sequence[Trial], settings: Settings) -> bool:
    """Whether a layer ends before its last evaluation: what `suggestion` may gain is not worth measuring."""
    return suggestion.gain is not None and suggestion.gain * trials[0].images < settings.stop_gain


class LayerEvaluator:
    """Measures points of a network's layers; the network's weights are as before after every call.

    `images` is the subset that scores; `network_bytes` is 4 x all elements that inference reads; `size` gives the bytes of a layer in the file;
    `cache_bytes` is what is kept of the network before a layer (`prefix`). `full`: full-precision weights by name, of layers that the network holds
    compressed already, with the `rates` at which it does: they are what a point compresses, and its distortion is then how far it moves the network's own.
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
        full: Mapping[str, torch.Tensor] | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self._size, self._full, self._rates = size, dict(full or {}), dict(rates or {})
        self._scores = LayerScores(model.to(device), images, batch_size, device, cache_bytes)
        self._model, self._images, self._network_bytes = model.to(device), images, network_bytes
        self._node = node
        self._original: float | None = None
        self._known: dict[str, Candidates] = {}

    def original(self, group: Group) -> float:
        """The top-1 error of the network as it is; measured once. `group`: whose turn it is, before whose layers values are kept."""
        if self._original is None:
            self._original = 1.0 - self._scores.evaluate(group.layers).top1
        return self._original

    def _weight(self, layer: str) -> torch.Tensor:
        """The layer's weights at full precision."""
        parameter = self._model.get_parameter(layer).detach()
        return self._full.get(layer, parameter).to(parameter.device)

    @torch.no_grad()
    def known(self, group: Group) -> Candidates:
        """What is known of `group` on the grid without the network; computed once. Of a large layer only every k-th row is coded."""
        if group.name not in self._known:
            weights = [self._weight(layer) for layer in group.layers]
            held = [self._model.get_parameter(layer).detach() for layer in group.layers]
            # where the network is, its distance has a kink
            anchors = sorted(
                {*ANCHORS, *(self._rates[layer] for layer in group.layers if layer in self._rates)}
            )
            self._known[group.name] = _curves(weights, held, anchors, self._network_bytes, self._size)
        return self._known[group.name]

    @torch.no_grad()
    def measure(
        self, group: Group, theta: Theta, *, step: int, origin: str, tradeoff: float,
        mean: float | None = None, deviation: float | None = None, beat: float | None = None,
    ) -> Trial:  # fmt: skip
        """Error, loss and size with `group` compressed by `theta`, and nothing else changed; `mean` and `deviation` are what was predicted. With `beat` the
        evaluation ends, and is a bound, once its objective must be above that."""
        started = time.monotonic()
        held = {layer: self._model.get_parameter(layer).detach().clone() for layer in group.layers}
        size, elements = 0, sum(weight.numel() for weight in held.values())
        try:
            for layer in held:
                weight = self._weight(layer)
                share = decide_share(weight, theta)
                quantized = quantize(weight, theta, share)
                size += self._size(codec.coded(quantized, share))
                self._model.get_parameter(layer).copy_(quantized.values)
            saved = (4 * elements - size) / self._network_bytes
            most = None if beat is None else (beat + tradeoff * saved) * len(self._images) + 1e-6
            result = self._scores.evaluate(group.layers, most)
        finally:
            for layer, weight in held.items():
                self._model.get_parameter(layer).copy_(weight)
        wrong = result.n - round(result.top1 * result.n)
        return Trial(
            layer=group.name,
            step=step,
            origin=origin,
            p=theta.p,
            b=theta.b,
            images=result.n,
            error=wrong / len(self._images),
            loss=result.loss,
            bytes=size,
            saved=saved,
            tradeoff=tradeoff,
            seconds=time.monotonic() - started,
            node=self._node,
            predicted_mean=mean,
            predicted_deviation=deviation,
            bound=result.n < len(self._images),
        )


def _curves(
    weights: Sequence[torch.Tensor],
    held: Sequence[torch.Tensor],
    anchors: Sequence[float],
    network_bytes: int,
    size: Callable[[codec.CodedLayer], int],
) -> Candidates:
    """Size and distortion on the grid of layers that share theta; `held`: the weights that distortion is measured from."""
    elements = sum(weight.numel() for weight in weights)
    parts = []
    for weight, own in zip(weights, held, strict=True):
        every = max(1, round(weight.numel() / SAMPLE))
        parts.append((weight[::every], own[::every], weight.numel()))
    rates = _rates(weights)
    saved, distortion = [], []
    for b in range(BITS_MIN, BITS_MAX + 1):
        sizes, lost = zip(*(_at(parts, Theta(p, b), size) for p in anchors), strict=True)
        saved.append((4 * elements - np.interp(rates, anchors, sizes)) / network_bytes)
        distortion.append(np.interp(rates, anchors, lost))
    grid = tuple(Theta(p, b) for b in range(BITS_MIN, BITS_MAX + 1) for p in rates)
    return Candidates(grid, np.concatenate(saved), np.concatenate(distortion))


def _rates(weights: Sequence[torch.Tensor]) -> list[float]:
    """The pruning rates of the grid, of the finer ones such that clip other weights than the rate before."""
    sides = [int(side.sum()) for weight in weights for side in (weight > 0, weight < 0)]

    def clipped(p: float) -> list[int]:
        return [math.floor(p * side + 0.5) for side in sides]

    return [
        p
        for before, p in zip((0.0, *RATES), RATES, strict=False)
        if p <= _COARSE or clipped(p) != clipped(before)
    ]


def _at(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor, int]],
    theta: Theta,
    size: Callable[[codec.CodedLayer], int],
) -> tuple[float, float]:
    """Bytes, and the share of the energy that is lost, of layers of which (rows, the same rows as they are held, all elements) are given."""
    total, lost, energy = 0.0, 0.0, 1e-300
    for rows, planned, elements in parts:
        # what a plan clips whole says nothing of what its weights are worth: they do
        held = planned if planned.any() else rows
        share = decide_share(rows, theta)
        quantized = quantize(rows, theta, share)
        times = elements / rows.numel()
        total += times * size(codec.coded(quantized, share))
        lost += times * float((held - quantized.values).double().square().sum())
        energy += times * float(held.double().square().sum())
    return total, lost / energy


def step_group(
    evaluator: LayerEvaluator, group: Group, trials: list[Trial], settings: Settings
) -> Trial | None:
    """One suggestion and its measurement, appended to `trials`; None where the group ends before its last evaluation (`exhausted`, or no point is left)."""
    known = evaluator.known(group)
    if len(trials) >= len(known.thetas):
        return None
    found = milder(trials, settings, known, lambda: evaluator.original(group))
    found = found or suggest(trials, group.name, settings, known)
    if exhausted(found, trials, settings):
        return None
    best = min((trial.objective(found.tradeoff) for trial in trials if not trial.bound), default=None)
    trial = evaluator.measure(
        group, found.theta, step=len(trials), origin=found.origin, tradeoff=found.tradeoff,
        mean=found.mean, deviation=found.deviation, beat=best if settings.early_stop else None,
    )  # fmt: skip
    trials.append(trial)
    return trial
