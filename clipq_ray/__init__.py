"""Trained vision networks in a fraction of the bytes: CLIP-Q (Tung and Mori, CVPR 2018) as a batch system on Ray.

The public names, sorted. Importing this package is light: a name loads its module when it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipq_ray.api import compress
    from clipq_ray.datasets import open_layers, open_trials
    from clipq_ray.loading import load, load_state_dict

__all__ = ["compress", "load", "load_state_dict", "open_layers", "open_trials"]

_HOMES = {
    "compress": "clipq_ray.api",
    "load": "clipq_ray.loading",
    "load_state_dict": "clipq_ray.loading",
    "open_layers": "clipq_ray.datasets",
    "open_trials": "clipq_ray.datasets",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipq_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
