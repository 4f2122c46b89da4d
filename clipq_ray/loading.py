"""A compressed network back as a plain `nn.Module`, or its tensors: what a consumer of .clq files needs, without Ray or training code.

Loading never runs foreign code: a file names a registered architecture, any other network is built by the caller's `factory`.
Not covered: executing on codes; weights come back as dense float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from clipq_ray import codec, manifest
from clipq_ray.errors import ModelError
from clipq_ray.storage import MODEL, Store

if TYPE_CHECKING:
    import os


def read_file(uri: str | os.PathLike[str]) -> bytes:
    """The bytes of a .clq file, given by itself or by its run directory (then checked against the manifest)."""
    if str(uri).rstrip("/").endswith(".clq"):
        store, name = Store.of_file(uri)
        return store.read(name)
    run = Store(uri)
    stated = manifest.read_manifest(run)["files"].get(MODEL, {})
    data = run.read(MODEL)
    return manifest.checked(data, stated, f"{run.uri}/{MODEL}")


def load_state_dict(uri: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a compressed network by name, tied ones under each of their names; float32 and integers, on the CPU."""
    return state_dict(codec.decode(read_file(uri)))


def load(
    uri: str | os.PathLike[str],
    factory: Callable[[], nn.Module] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The compressed network in eval mode.

    `uri` is a .clq file or a run directory, local or any fsspec URI. `factory` builds the network where the file names no registered
    architecture. Parameters that inference never reads (auxiliary heads) are not in the file: they are NaN, so use would be loud.
    """
    return from_packed(codec.decode(read_file(uri)), factory).to(device)


def state_dict(packed: codec.Packed) -> dict[str, Tensor]:
    """The tensors of a decoded file, ties restored."""
    result = {
        name: torch.from_numpy(np.ascontiguousarray(t.values() if isinstance(t, codec.CodedLayer) else t))
        for name, t in packed.tensors.items()
    }
    for alias, name in packed.metadata.get("ties", {}).items():
        result[alias] = result[name]
    return result


def from_packed(packed: codec.Packed, factory: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The network of a decoded file, in eval mode; `ModelError` where network and file do not fit."""
    model = factory() if factory is not None else _registered(packed.metadata)
    state: dict[str, Any] = state_dict(packed)
    wanted = model.state_dict()
    dropped = set(packed.metadata.get("dropped", []))
    for name, value in wanted.items():
        if name in state:
            continue
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros_like(value)
        elif name in dropped:
            state[name] = (
                torch.full_like(value, torch.nan) if value.is_floating_point() else torch.zeros_like(value)
            )
    if missing := sorted(set(wanted) - set(state)):
        raise ModelError(
            f"the network does not fit the file: it lacks {', '.join(missing[:3])}; pass the factory that it was made with"
        )
    complete = model.state_dict()  # carries the versions of the modules' state, which some networks ask for
    complete.update(state)
    try:
        model.load_state_dict(complete)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the network does not fit the file: {reason}; pass the factory that it was made with"
        ) from error
    return model.eval()


def _registered(metadata: dict[str, Any]) -> nn.Module:
    from clipq_ray import models  # torchvision is needed only here

    named = metadata.get("architecture")
    if not named:
        raise ModelError("the file names no registered network; pass factory= that builds it")
    try:
        return models.build(models.Architecture.from_json(named))
    except ModelError as error:
        raise ModelError(f"{error}; or pass factory= that builds it") from error
