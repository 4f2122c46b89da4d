"""What a user's own network computes, as a hash: of its structure and of the code that makes it, so that one that was edited is another one.

A registered network is told by its name and arguments; of another one the name stays when its `forward` changes. What is hashed: how the modules nest, names and
shapes of what a state dict holds, plain attributes, and the source of the files that define the modules' classes (in a script or a notebook, of the classes
alone, so that other lines may change). Not covered: code further away that these files import, and weights (`weights`).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_LIBRARIES = {"torch", "torchvision", *sys.stdlib_module_names}
"""Their versions count by themselves."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_PLAIN = (bool, int, float, str, tuple, type(None))


def definition_sha256(model: nn.Module, maker: Callable[..., Any] | None = None) -> str:
    """SHA-256 in hex of what `model` is, and of `maker`, the function that it is from; the same in every process."""
    code = {kind for module in model.modules() for kind in type(module).__mro__} | {maker or nn.Module}
    own = {one for one in code if one.__module__.partition(".")[0] not in _LIBRARIES}
    parts = {
        "modules": _ADDRESS.sub("", repr(model)),
        "tensors": [(name, tuple(one.shape), str(one.dtype)) for name, one in model.state_dict().items()],
        "attributes": [_attributes(module) for module in model.modules()],
        "code": sorted({text for one in own for text in _sources(one)}),
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _attributes(module: nn.Module) -> list[tuple[str, str]]:
    """What a `forward` may read beside tensors and modules."""
    found = []
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name == "training":
            continue
        if isinstance(value, FunctionType):
            found.append((name, _function(value)))
        elif isinstance(value, _PLAIN):
            found.append((name, repr(value)))
    return found


def _sources(one: Any) -> Iterator[str]:
    """What defines a class or a function, and the file around it, unless that is a script."""
    functions = [one] if isinstance(one, FunctionType) else vars(one).values()
    own = [_function(value) for value in functions if isinstance(value, FunctionType)]
    yield "\n".join([one.__qualname__, *own])
    module = sys.modules.get(one.__module__)
    if module is not None and one.__module__ != "__main__":
        with suppress(OSError, TypeError):  # compiled, or made on the fly
            yield inspect.getsource(module)


def _function(value: FunctionType) -> str:
    """Its source, or its bytecode where there is none."""
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return repr(_bytecode(value.__code__))


def _bytecode(code: CodeType) -> list[Any]:
    """Without addresses and line numbers."""
    constants = [_bytecode(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return [code.co_code.hex(), code.co_names, code.co_varnames, constants]
