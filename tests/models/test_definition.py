"""A user's own network is another one when what it computes is."""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import re
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import transforms

from clipq_ray.models import definition_sha256, imported


class Net(nn.Module):
    def __init__(self, hidden: int = 4, slope: float = 0.1) -> None:
        super().__init__()
        self.linear = nn.Linear(3, hidden)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.leaky_relu(self.linear(x), self.slope)


def squared() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.slope = 0.1

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).square()

    return Net()


def test_weights_and_modes_make_no_other_network() -> None:
    assert definition_sha256(Net()) == definition_sha256(Net().eval().requires_grad_(False))


def test_structure_attributes_and_code_do() -> None:
    networks = [Net(), Net(5), Net(slope=0.2), squared(), nn.Sequential(Net()), nn.Linear(3, 4)]
    assert len({definition_sha256(one) for one in networks}) == len(networks)


class Holding(nn.Module):
    """A network whose `forward` reads what it holds."""

    def __init__(self, value: Any, buffer: Tensor | None = None) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.value = value
        self.register_buffer("constant", buffer, persistent=False)


@dataclass(slots=True)
class Slotted:
    scale: int


@dataclass
class Shadowing(Slotted):
    scale: int = 2


def closed(number: int) -> Any:
    return lambda x: x + number


def hooked(factor: int) -> nn.Module:
    net = Holding(0)
    net.linear.register_forward_hook(lambda module, given, out: out * factor)
    return net


def own_order(*names: str) -> nn.Module:
    net = Holding(0)
    net.value = [getattr(net, name) for name in names]
    return net


def graph(function: Any) -> nn.Module:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = function(x)
            return result

    return torch.fx.symbolic_trace(Root())


DIFFER: dict[str, tuple[Any, Any]] = {
    "lists": (Holding([0, 1, 2]), Holding([2, 1, 0])),
    "dictionaries": (Holding({"a": 1}), Holding({"a": 2})),
    "functions of torch": (Holding(torch.relu), Holding(torch.tanh)),
    "arguments": (Holding(partial(torch.clamp, min=0)), Holding(partial(torch.clamp, min=1))),
    "closures": (Holding(closed(1)), Holding(closed(2))),
    "tensors": (Holding(torch.zeros(2)), Holding(torch.ones(2))),
    "buffers that no state dict has": (Holding(0, torch.zeros(2)), Holding(0, torch.ones(2))),
    "hooks": (hooked(1), hooked(2)),
    "modules in a list": (own_order("linear", "other"), own_order("other", "linear")),
    "graphs": (graph(torch.relu), graph(torch.tanh)),
    "parsed arguments": (Holding(argparse.Namespace(scale=1)), Holding(argparse.Namespace(scale=2))),
    "namespaces": (Holding(SimpleNamespace(scale=1)), Holding(SimpleNamespace(scale=2))),
    "numbers of numpy": (Holding(np.float32(1.0)), Holding(np.float32(1.5))),
    "types of numbers": (Holding(np.int32(1)), Holding(np.int64(1))),
    "arrays": (Holding(np.array([1.0, 2.0])[::-1]), Holding(np.array([1.0, 2.0]))),
    "arrays of text": (Holding(np.array(["cat", "dog"])), Holding(np.array(["dog", "cat"]))),
    "arrays of objects": (Holding(np.array([1, "a"], object)), Holding(np.array([2, "a"], object))),
    "objects with slots": (Holding(Slotted(1)), Holding(Slotted(2))),
    "objects whose slots a subclass shadows": (Holding(Shadowing(1)), Holding(Shadowing(2))),
    "paths": (Holding(Path("a")), Holding(Path("b"))),
    "patterns": (Holding(re.compile("a" * 200 + "b")), Holding(re.compile("a" * 200 + "c"))),
    "functions of numpy": (Holding(np.tanh), Holding(np.exp)),
    "decimals": (Holding(Decimal("0.1")), Holding(Decimal("0.2"))),
    "queues": (Holding(deque([1, 2])), Holding(deque([2, 1]))),
    "transforms": (Holding(transforms.CenterCrop(8)), Holding(transforms.CenterCrop(9))),
}


@pytest.mark.parametrize("what", DIFFER)
def test_what_a_network_holds_counts_by_its_value(what: str) -> None:
    one, other = DIFFER[what]
    assert definition_sha256(one) == definition_sha256(copy.deepcopy(one)) != definition_sha256(other)


def test_a_working_directory_of_its_own_makes_no_other_network() -> None:
    first, second = (definition_sha256(Holding(Path(f"/job/{number}/own/classes.txt"))) for number in (1, 2))
    assert first == second != definition_sha256(Holding(Path("/job/1/own/names.txt")))


class Cached:
    """Says of itself what it holds; the rest is a cache, whose values are other ones in every process."""

    __slots__ = ("cache",)

    def __init__(self, cache: int) -> None:
        self.cache = cache

    def __getstate__(self) -> None:
        return None


def test_what_an_object_keeps_from_its_copies_makes_no_other_network() -> None:
    assert definition_sha256(Holding(Cached(1))) == definition_sha256(Holding(Cached(2)))


def test_libraries_wrap_and_keep_what_is_the_same() -> None:
    def twice(wrap: Any) -> list[str]:
        return [definition_sha256(wrap(Net())) for _ in range(2)]

    for wrap in (
        nn.DataParallel,
        lambda net: nn.utils.parametrizations.weight_norm(net.linear),
        torch.compile,
    ):
        first, second = twice(wrap)
        assert first == second


def test_a_maker_may_be_any_object_that_can_be_called() -> None:
    class Maker:
        def __init__(self, hidden: int) -> None:
            self.hidden = hidden

        def __call__(self) -> nn.Module:
            return Net()

    made = [definition_sha256(Net(), maker) for maker in (Maker(1), Maker(1), Maker(2), partial(Net, 4), Net)]
    assert made[0] == made[1]
    assert len(set(made)) == 4


TEXT = """from torch import nn

def active(x):
    return x.{what}()

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return active(self.linear(x))

def make():
    return Own()
"""


def test_an_edited_file_does_also_where_only_a_function_beside_the_class_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "own_network_of_a_test.py"
    found = []
    for what in ("relu", "sigmoid", "relu"):
        file.write_text(TEXT.format(what=what))
        importlib.invalidate_caches()
        sys.modules.pop(file.stem, None)
        make = imported(f"{file.stem}:make")
        found.append(definition_sha256(make(), make))
    assert found[0] == found[2] != found[1]


SCRIPT = """
import sys
from torch import nn
def active(x):
    return x.{what}() if "{what}" in {{"relu", "tanh", "gelu"}} else x
class Own(nn.Module):
    mode = "{mode}"
    @staticmethod
    def small(x):
        return x.{what}()
    def forward(self, x):
        each = [scaled(one) for one in x]
        return active(x) + sum(each) if self.mode in {{"a", "b"}} else self.small(x)
scale = {scale}
def scaled(x):
    return (lambda: x * scale)()
# {comment}
from clipq_ray.models import definition_sha256
print(definition_sha256(Own()))
"""


def test_of_a_script_the_classes_alone_count(tmp_path: Path) -> None:
    def said(what: str, comment: str, mode: str = "a", seed: str = "1", scale: int = 1) -> str:
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.format(what=what, comment=comment, mode=mode, scale=scale))
        root = str(Path(__file__).parents[2])
        return subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": seed}
        ).stdout  # fmt: skip

    first = said("relu", "one")
    assert first == said("relu", "two", seed="2")
    assert first not in (said("tanh", "one"), said("relu", "one", mode="b"))
    assert first != said("relu", "one", scale=2)  # named in a comprehension and a lambda alone
