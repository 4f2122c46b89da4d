"""The plan of a network: theta = (p, b) and the share of intervals for every layer.

A plan is a value: frozen, JSON in and out, decided before fine-tuning, which may scale its pruning rates to hold a size (`rates`). Not covered: how it is found (`search`) and what it
does to a weight (`quantizer`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from clipq_ray.errors import ConfigError, FormatError

BITS_MIN, BITS_MAX = 2, 8


@dataclass(frozen=True, order=True)
class Theta:
    """One layer's pruning rate `p` in [0, 1) and bit width `b` in 2..8 (method: CLIP-Q, section 3.1)."""

    p: float
    b: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.p) and 0.0 <= self.p < 1.0):
            raise ConfigError(f"expected a pruning rate p in [0, 1), got {self.p}")
        if isinstance(self.b, bool) or int(self.b) != self.b or not BITS_MIN <= self.b <= BITS_MAX:
            raise ConfigError(f"expected a whole bit width b in {BITS_MIN}..{BITS_MAX}, got {self.b}")

    @property
    def intervals(self) -> int:
        """The number of intervals besides zero, 2^b - 1."""
        return (1 << self.b) - 1


@dataclass(frozen=True)
class Share:
    """How many of the intervals lie on the negative and on the positive side; fixed for a whole fine-tuning."""

    negative: int
    positive: int

    def __post_init__(self) -> None:
        if self.negative < 0 or self.positive < 0:
            raise ConfigError(
                f"expected shares of at least 0 intervals, got {self.negative} and {self.positive}"
            )


@dataclass(frozen=True)
class LayerPlan:
    """What is done to one layer; `layer` is the weight's name in the state dict."""

    layer: str
    theta: Theta
    share: Share


@dataclass(frozen=True)
class Plan:
    """All layers of one network, in the order of its state dict."""

    layers: tuple[LayerPlan, ...]

    def at(self, rates: Sequence[float]) -> Plan:
        """The same with these pruning rates, one per layer."""
        return Plan(
            tuple(
                replace(layer, theta=replace(layer.theta, p=p))
                for layer, p in zip(self.layers, rates, strict=True)
            )
        )

    def to_json(self) -> str:
        """The plan as JSON, the same bytes for the same plan."""
        return json.dumps({"layers": [asdict(layer) for layer in self.layers]}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """The mirror of `to_json`; `FormatError` if the text is no plan."""
        try:
            rows: list[dict[str, Any]] = json.loads(text)["layers"]
            return cls(
                tuple(LayerPlan(row["layer"], Theta(**row["theta"]), Share(**row["share"])) for row in rows)
            )
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"expected a plan (JSON with layers, theta, share), got {error!r}") from error
