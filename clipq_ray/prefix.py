"""The evaluations of one layer, or of a few, without the part of the network that does not depend on it.

Only their weights change between the evaluations of a search, so everything that does not come behind it is computed once per batch and kept:
the network's graph (torch.fx) is cut at the values that the dependent part reads, whatever branches and shortcuts there are. `cut` gives
both parts, checked against the whole network on real images; a network that cannot be traced, or whose parts do not agree with it (values
that are changed in place, control flow that depends on values), is evaluated whole. `LayerScores` keeps the values of as many batches as a limit allows.
Not covered: what is changed between evaluations (`search`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from clipq_ray.data import Split, batches
from clipq_ray.evaluate import Evaluation, Forward, Tally, evaluating, logits, repeated
from clipq_ray.memory import ran_out

AGREEMENT = 1e-5
"""Of the largest logit: the most by which logits of the cut network may differ from those of the whole one."""

CHECKED = 2
"""Images on which a cut network is compared with the whole one, for every layer."""


@dataclass(frozen=True)
class Cut:
    """A network in two parts: `before(images)` gives the values that `behind(values)` reads to give the class scores."""

    before: Callable[[Tensor], tuple[Any, ...]]
    behind: Callable[[tuple[Any, ...]], Tensor]


def traced(model: nn.Module, training: bool = False) -> fx.GraphModule | None:
    """The graph of `model` in eval mode, or as it is trained, which shares its weights; None where torch.fx cannot trace it."""
    with evaluating(model):
        model.train(training)
        try:
            return fx.symbolic_trace(model)
        except Exception:  # tracing runs the network's own code on stand-ins, which may raise anything
            return None


@torch.inference_mode()
def cut(graph: fx.GraphModule, model: nn.Module, layers: Sequence[str], images: Tensor) -> Cut | None:
    """`model` cut at the parameters `layers`; None where its parts do not give the same as the whole on `images`."""
    dependent = _dependent(graph, [model.get_parameter(layer) for layer in layers])
    if not dependent:
        return None
    frontier = _frontier(graph, dependent)
    with evaluating(model):
        before = _module(graph, [n for n in graph.graph.nodes if n not in dependent], (), frontier)
        behind = _module(graph, [n for n in graph.graph.nodes if n in dependent], frontier, None)
        result = Cut(before, lambda values: logits(behind(*values)))
        try:
            expected = logits(model(images))
            values = result.before(images)
            # twice: what is changed in place shows in the second pass
            found = [result.behind(values) for _ in range(2)]
        except Exception as error:
            if ran_out(error):
                raise
            return None
    most = AGREEMENT * max(float(expected.abs().max()), 1.0)
    return result if all(torch.allclose(one, expected, rtol=0, atol=most) for one in found) else None


def _dependent(graph: fx.GraphModule, parameters: Sequence[nn.Parameter]) -> set[fx.Node]:
    """The nodes that read one of `parameters`, by whatever name, and all that read them; the output among them."""
    result: set[fx.Node] = set()
    storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    for node in graph.graph.nodes:
        reads = False
        if node.op == "call_module":
            reads = any(_held(one, storages) for one in graph.get_submodule(str(node.target)).parameters())
        elif node.op == "get_attr":
            reads = _held(_attribute(graph, str(node.target)), storages)
        if reads or any(source in result for source in node.all_input_nodes):
            result.add(node)
    outputs = [node for node in graph.graph.nodes if node.op == "output"]
    return result if result.issuperset(outputs) else set()


def _held(one: Any, storages: set[int]) -> bool:
    """Whether `one` lies in one of `storages`: two parameters may be views of one tensor."""
    return isinstance(one, Tensor) and one.untyped_storage().data_ptr() in storages


def _attribute(graph: fx.GraphModule, name: str) -> Any:
    owner, _, last = name.rpartition(".")
    return getattr(graph.get_submodule(owner), last)


def _frontier(graph: fx.GraphModule, dependent: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The nodes outside of `dependent` that it reads, in their order."""
    read = {source for node in dependent for source in node.all_input_nodes} - dependent
    return tuple(node for node in graph.graph.nodes if node in read)


def _module(
    graph: fx.GraphModule,
    nodes: list[fx.Node],
    given: tuple[fx.Node, ...],
    wanted: tuple[fx.Node, ...] | None,
) -> fx.GraphModule:
    """`nodes` as a module that takes the values of `given` and returns those of `wanted`, or else the graph's output."""
    part = fx.Graph()
    copies = {node: part.placeholder(f"value_{index}") for index, node in enumerate(given)}
    for node in nodes:
        if node.op == "output":
            continue
        copies[node] = part.node_copy(node, lambda source: copies[source])
    if wanted is None:
        (end,) = (node for node in nodes if node.op == "output")
        part.output(fx.node.map_arg(end.args[0], lambda source: copies[source]))
    else:
        part.output(tuple(copies[node] for node in wanted))
    return fx.GraphModule(graph, part).eval()


class LayerScores:
    """Evaluations of a network on one split between which only some layers' weights change, until others are asked for.

    `limit_bytes`: what is kept of the values before them; batches beyond it are evaluated whole, as all are with 0.
    """

    def __init__(
        self, model: nn.Module, split: Split, batch_size: int, device: torch.device, limit_bytes: int
    ) -> None:
        self._model, self._split = model, split
        self._parts = torch.arange(len(split)).split(batch_size)
        self._forward, self._limit = Forward(model, device), limit_bytes
        self._graph: fx.GraphModule | None = None
        self._traced = False
        self._layers: tuple[str, ...] = ()
        self._cut: Cut | None = None
        self._kept: list[tuple[tuple[Any, ...], Tensor]] = []  # values and labels of the first batches

    @torch.inference_mode()
    def evaluate(self, layers: Sequence[str], most_wrong: float | None = None) -> Evaluation:
        """Score the network as it is; between calls with the same `layers` nothing but these parameters may have changed.

        With `most_wrong` it ends after the batch with which more images than that are wrong; `n` says how many were looked at.
        """
        try:
            return self._evaluate(tuple(layers), most_wrong)
        except Exception as error:
            if not ran_out(error):
                raise
            # what is kept leaves too little memory, or a whole batch does not fit: the whole network goes on in parts
            self._cut, self._kept, self._limit = None, [], 0
            return self._evaluate(tuple(layers), most_wrong)

    def _evaluate(self, layers: tuple[str, ...], most_wrong: float | None) -> Evaluation:
        tally = Tally(len(self._split))
        with evaluating(self._model):
            if layers != self._layers:
                self._begin(layers)
            for scores, labels in self._scores():
                tally.add(scores, labels)
                if most_wrong is not None and tally.done - tally.top1 > most_wrong:
                    break
        return tally.result()

    def _scores(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Class scores and labels, batch by batch."""
        for values, labels in self._kept:
            assert self._cut is not None
            with repeated():
                scores = self._cut.behind(values).float().cpu()
            yield scores, labels
        for pixels, labels in batches(self._split, self._parts[len(self._kept) :], lambda step: None):
            yield self._forward(pixels), labels

    def _begin(self, layers: tuple[str, ...]) -> None:
        """Cut the network at `layers`, and keep the values of the first batches."""
        self._layers, self._cut, self._kept = layers, None, []
        if self._limit <= 0:
            return
        left = self._limit
        for pixels, labels in batches(self._split, self._parts, lambda step: None):
            if self._cut is None:
                self._cut = self._cut_at(layers, pixels[:CHECKED])
                if self._cut is None:
                    return
            values = self._cut.before(self._forward.placed(pixels))
            left -= size(values)
            if left < 0:
                return
            self._kept.append((values, labels))

    def _cut_at(self, layers: tuple[str, ...], images: Tensor) -> Cut | None:
        if not self._traced:
            self._forward(images)  # finds the layout that the network takes
            self._graph, self._traced = traced(self._model), True
        return (
            None
            if self._graph is None
            else cut(self._graph, self._model, layers, self._forward.placed(images))
        )


def size(values: Any) -> int:
    """Bytes of the memory behind the tensors in `values`, each once, however deep they lie."""
    found: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, list | tuple):
            for one in value:
                look(one)
        elif isinstance(value, dict):
            look(list(value.values()))

    look(values)
    return sum(found.values())
