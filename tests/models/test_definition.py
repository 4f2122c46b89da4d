"""A user's own network is another one when what it computes is."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

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
class Own(nn.Module):
    def forward(self, x):
        return x.{what}()
# {comment}
from clipq_ray.models import definition_sha256
print(definition_sha256(Own()))
"""


def test_of_a_script_the_classes_alone_count(tmp_path: Path) -> None:
    def said(what: str, comment: str) -> str:
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.format(what=what, comment=comment))
        root = str(Path(__file__).parents[2])
        return subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": root}
        ).stdout  # fmt: skip

    first = said("relu", "one")
    assert first == said("relu", "two") != said("tanh", "one")
