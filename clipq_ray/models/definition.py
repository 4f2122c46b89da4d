"""What a user's own network computes, as a hash: of its structure and of the code that makes it, so that one that was edited is another one.

A registered network is told by its name and arguments; of another one the name stays when its `forward` changes. What is hashed: how the modules nest, names and
shapes of what a state dict holds, all other attributes, buffers and hooks, the code of the classes with what it names, and the files that define them (not that of
a script, whose other lines may change). Values count; addresses, the order of sets and the folders of absolute paths do not. Not covered: code that these files import, and weights (`weights`).
"""

from __future__ import annotations

import argparse
import builtins
import datetime
import functools
import hashlib
import inspect
import json
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePath
from types import (
    CellType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LIBRARIES = {"torch", "torchvision", *sys.stdlib_module_names}
"""Their versions count by themselves."""
_OF_MODULES = set(vars(nn.Module()))
_PLAIN = (
    bool, int, float, complex, str, bytes, range, slice, Enum, np.generic, Decimal, Fraction, datetime.date, datetime.time, datetime.timedelta,
    torch.dtype, torch.device, torch.Size, torch.memory_format, torch.layout,
)  # fmt: skip
"""What is told by its text."""
_HOLDERS = (SimpleNamespace, argparse.Namespace)
"""Of Python's own: what a user keeps in them is the user's."""


def definition_sha256(model: nn.Module, maker: Callable[..., Any] | None = None) -> str:
    """SHA-256 in hex of what `model` is, and of `maker`, what it is from; the same in every process of one version of Python."""
    told = _Told(model)
    parts = {
        "modules": [(name, *told.module(module)) for name, module in model.named_modules()],
        "tensors": [(name, told.shape(one)) for name, one in model.state_dict().items()],
        "maker": told.of(maker),
    }
    files = {hashlib.sha256(text.encode()).hexdigest() for text in told.files()}
    return hashlib.sha256(json.dumps([parts, sorted(files)]).encode()).hexdigest()


def _in_a_library(one: Any) -> bool:
    """Whether a class or function is a library's; what is made by `exec` says that it is one of Python's own."""
    name = str(getattr(one, "__module__", None) or "builtins")
    if name == "builtins":
        return getattr(builtins, one.__qualname__.partition(".")[0], None) is not None
    return name.partition(".")[0] in _LIBRARIES


def _names(code: CodeType) -> dict[str, None]:
    """What a function's code names, and that of the functions, generators and comprehensions in it, in order."""
    inner = [name for one in code.co_consts if isinstance(one, CodeType) for name in _names(one)]
    return dict.fromkeys([*code.co_names, *inner])


def _held(value: Any) -> Any:
    """What an object holds, in slots too; None of a library's: locks, loggers and caches change while they are used."""
    of: Any = type(value)
    own = isinstance(value, _HOLDERS) or of.__module__.startswith("torchvision.transforms")
    if _in_a_library(of) and not own:
        return None
    if of.__getstate__ is object.__getstate__:
        return value.__getstate__()
    return getattr(value, "__dict__", None)  # what objects say of themselves may be anything


class _Told:
    """Values as what JSON can hold. An object that refers to others is told once and by its number from then on; modules and tensors of `model` by theirs."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: dict[int, tuple[int, Any]] = {}  # with the object, so that no id is given again
        self._own: set[str] = set()
        for one in (*model.modules(), *model.parameters(), *model.state_dict(keep_vars=True).values()):
            self._again(one)

    def _again(self, value: Any) -> int | None:
        """The number of an object that was there before, else None, and it has one from now on."""
        if id(value) in self._seen:
            return self._seen[id(value)][0]
        self._seen[id(value)] = len(self._seen), value
        return None

    def files(self) -> Iterator[str]:
        """The source of the modules that define what was told."""
        for name in self._own - {"__main__"}:
            try:
                yield inspect.getsource(sys.modules[name])
            except (KeyError, OSError, TypeError):  # compiled, or made on the fly
                continue

    def module(self, module: nn.Module) -> list[Any]:
        """A module without its children and parameters."""
        attributes = {name: value for name, value in vars(module).items() if name not in _OF_MODULES}
        if isinstance(module, torch.fx.GraphModule):
            attributes = {"code": module.code}
        if type(module).__module__.startswith("torch._dynamo"):  # torch.compile counts what it wraps
            attributes = {}
        hooks = [
            self.of(list(found.values())) for found in (module._forward_pre_hooks, module._forward_hooks)
        ]
        buffers = [
            (name, self.tensor(module._buffers[name])) for name in sorted(module._non_persistent_buffers_set)
        ]
        return [
            self.of(type(module)),
            [(name, self.of(attributes[name])) for name in sorted(attributes)],
            hooks,
            buffers,
        ]

    def shape(self, value: Any) -> Any:
        """What a state dict holds, without the values of tensors."""
        return [list(value.shape), str(value.dtype)] if isinstance(value, Tensor) else self.of(value)

    def array(self, value: np.ndarray[Any, Any]) -> Any:
        """An array by its values, of whatever they are."""
        told = ["array", list(value.shape), value.dtype.str]
        if value.dtype.hasobject:
            return [*told, self.of(value.tolist())]
        return [*told, hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()]

    def tensor(self, value: Tensor | None) -> Any:
        """A tensor by its values."""
        if value is None:
            return None
        array = value.detach().cpu().contiguous()
        data = array.flatten().view(torch.uint8).numpy().tobytes() if array.numel() else b""
        return ["tensor", list(array.shape), str(array.dtype), hashlib.sha256(data).hexdigest()]

    def of(self, value: Any) -> Any:
        """Any value."""
        if value is None or isinstance(value, _PLAIN):
            return [type(value).__name__, str(value)]
        if isinstance(value, tuple):
            return [type(value).__name__, [self.of(one) for one in value]]
        if isinstance(value, re.Pattern):
            return ["pattern", self.of(value.pattern), value.flags]
        if isinstance(value, PurePath):  # a job's working directory is another one each time
            return [type(value).__name__, value.name if value.is_absolute() else str(value)]
        if isinstance(value, (set, frozenset)):
            return [type(value).__name__, sorted(json.dumps(self.of(one)) for one in value)]
        if isinstance(value, CodeType):
            return [value.co_code.hex(), value.co_names, value.co_varnames, self.of(value.co_consts)]
        if isinstance(value, ModuleType):
            return ["import", value.__name__]
        if (number := self._again(value)) is not None:
            return ["again", number]
        if isinstance(value, (list, deque)):
            return [type(value).__name__, [self.of(one) for one in value]]
        if isinstance(value, dict):
            return ["dict", [(self.of(key), self.of(one)) for key, one in value.items()]]
        if isinstance(value, Tensor):
            return self.tensor(value)
        return self.array(value) if isinstance(value, np.ndarray) else self._code(value)

    def _code(self, value: Any) -> Any:
        """Classes, what can be called, and other objects."""
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, functools.partial):
            return ["partial", self.of(value.func), self.of(value.args), self.of(value.keywords)]
        if isinstance(value, (staticmethod, classmethod, MethodType)):
            return ["method", self.of(value.__func__), self.of(getattr(value, "__self__", None))]
        if isinstance(value, np.ufunc):
            return ["ufunc", value.__name__]
        if isinstance(value, property):
            return ["property", self.of(value.fget), self.of(value.fset)]
        if inspect.isroutine(value):
            return ["routine", str(getattr(value, "__module__", None)), value.__qualname__]
        return ["object", self.of(type(value)), self.of(_held(value))]

    def _class(self, one: type) -> Any:
        name = [one.__module__, one.__qualname__]
        if _in_a_library(one):
            return name
        self._own.add(one.__module__)
        held = {
            key: value
            for key, value in vars(one).items()
            if inspect.isroutine(value) or isinstance(value, property) or not key.startswith("__")
        }
        bases = [self.of(base) for base in one.__bases__]
        return [*name, bases, [(key, self.of(held[key])) for key in sorted(held)]]

    def _function(self, one: FunctionType) -> Any:
        name = [one.__module__, one.__qualname__]
        if _in_a_library(one):
            return name
        self._own.add(one.__module__)
        closed = [self.of(cell.cell_contents) for cell in one.__closure__ or () if cell != CellType()]
        # of a script the file is not told, so what its functions name is
        names = [
            key for key in _names(one.__code__) if key in one.__globals__ and one.__module__ == "__main__"
        ]
        named = [(key, self.of(one.__globals__[key])) for key in names]
        return [
            *name,
            self.of(one.__code__),
            self.of(one.__defaults__),
            self.of(one.__kwdefaults__),
            closed,
            named,
        ]
