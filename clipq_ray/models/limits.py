"""How much the constructor of a network may make, where its arguments come from a file and any of them may ask for more than a machine has.

What torch makes is counted as it is made, before anything is drawn into it, so arguments of every kind (a width, a number of classes, a list of
blocks) are held to what the file can fill. Not covered: what a constructor does without making tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from clipq_ray.errors import ModelError


class Limit(TorchFunctionMode):
    """Inside, in this thread, it is a `ModelError` to make more than `tensors` tensors or `elements` elements in all; `exceeded`: whether it was."""

    def __init__(self, tensors: int, elements: int) -> None:
        super().__init__()
        self._tensors, self._elements = tensors, elements
        self._made = self._held = 0

    @property
    def exceeded(self) -> bool:
        """Whether more was made than may be."""
        return self._made > self._tensors or self._held > self._elements

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if isinstance(made, Tensor) and not any(isinstance(one, Tensor) for one in (*args, *kwargs.values())):
            self._made, self._held = self._made + 1, self._held + made.numel()
            if self.exceeded:
                raise ModelError(
                    f"expected a network of at most {self._tensors:,} tensors and {self._elements:,} elements, as the file can fill, got a larger one"
                )
        return made
