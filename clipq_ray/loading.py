"""A compressed network back as a plain `nn.Module`, or its tensors: what a consumer of .clq files needs, without Ray or training code.

Loading never runs foreign code: a file names a registered architecture, any other network is built by the caller's `factory`.
Not covered: executing on codes; weights come back as dense float32.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from clipq_ray import codec, manifest
from clipq_ray.errors import ModelError, StorageError, brief
from clipq_ray.storage import MANIFEST, MODEL, Store

if TYPE_CHECKING:
    # Locating and reading a file, as `clipq inspect` does, goes without: importing torch takes seconds.
    import torch
    from torch import Tensor, nn

    from clipq_ray import models

_TENSORS_FREE, _ELEMENTS_FREE = 1000, 1 << 24
"""A network has at most twice the tensors and elements of its file, and so many more: counters are not in it, and nor are the heads of training, which
are as large as the rest of GoogLeNet."""
_ADVICE = re.compile(r"; (nearest names: |e\.g\. |check --model-args|pass factory=).*$")
"""What is said to those who make a file, of networks and their arguments."""
_FILE = re.compile(r"\.clq/*(\?|$)|^https?://.*\?")
"""URIs of files by their looks. Behind a query, as presigned URLs have, there is nothing more."""


def file_at(uri: str | os.PathLike[str]) -> tuple[Store, str] | None:
    """The store and the name of a file that is given by itself, None for a directory: by its ending, or because it is there and is no run."""
    if _FILE.search(os.fspath(uri)):
        return Store.of_file(uri)
    # On the web a directory is there as well, as a page.
    if Store(uri).exists(MANIFEST):
        return None
    try:
        store, name = Store.of_file(uri)
    except StorageError:  # a bucket
        return None
    return (store, name) if store.exists(name) else None


def _located(uri: str | os.PathLike[str]) -> tuple[Store, str, dict[str, Any] | None]:
    """The store and the name of a .clq file, given by itself or by its run directory; then what the manifest states of it."""
    if file := file_at(uri):
        return *file, None
    run = Store(uri)
    return run, MODEL, manifest.read_manifest(run)["files"].get(MODEL, {})


def read_file(uri: str | os.PathLike[str]) -> bytes:
    """The bytes of a .clq file, given by itself or by its run directory (then checked against the manifest)."""
    store, name, stated = _located(uri)
    data = store.read(name)
    return data if stated is None else manifest.checked(data, stated, f"{store.uri}/{name}")


def load_state_dict(uri: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a compressed network by name, tied ones under each of their names; float32 and integers, on the CPU.

    With `names`, only those: from a .clq file or a run on object storage, the header and the blobs of these tensors are fetched and
    nothing else; a blob is checked by its own checksum, the file as a whole is not.
    """
    import torch

    if names is None:
        return state_dict(read_file(uri))
    names = [names] if isinstance(names, str) else list(names)
    store, name, _ = _located(uri)
    size = store.size(name)

    def read(start: int, stop: int) -> bytes:
        return store.read_range(name, start, stop)

    found = codec.read_header(read, size)
    ties = found.metadata.get("ties", {})
    arrays = codec.arrays_from(read, found, {ties.get(one, one) for one in names})
    return {one: torch.from_numpy(arrays[ties.get(one, one)]) for one in names}


def load(
    uri: str | os.PathLike[str],
    factory: Callable[[], nn.Module] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The compressed network in eval mode.

    `uri` is a .clq file or a run directory, local or any fsspec URI. `factory` builds the network where the file names no registered
    architecture; a registered one that is much larger than what the file holds for it is refused before it takes memory. Parameters that
    inference never reads (auxiliary heads) are not in the file: they are NaN, so use would be loud. Batch norm may be folded: its running
    mean is 0 and its variance 1, right for inference and no start for training.
    """
    return from_bytes(read_file(uri), factory).to(device)


def state_dict(data: bytes) -> dict[str, Tensor]:
    """The tensors of a file's bytes, ties restored."""
    import torch

    result = {name: torch.from_numpy(array) for name, array in codec.arrays(data).items()}
    for alias, name in codec.metadata(data).get("ties", {}).items():
        result[alias] = result[name]
    return result


def from_bytes(data: bytes, factory: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The network of a file's bytes, in eval mode; `ModelError` where network and file do not fit."""
    import torch
    from torch import nn

    metadata = codec.metadata(data)
    state: dict[str, Any] = state_dict(data)
    model = factory() if factory is not None else _registered(metadata, state)
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a factory that returns a network, got {type(model).__name__}; return it")
    wanted = model.state_dict()
    dropped = set(metadata.get("dropped", []))
    for name, value in wanted.items():
        if name in state:
            continue
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros_like(value, device="cpu")
        elif name in dropped:
            fill = torch.nan if value.is_floating_point() else 0
            state[name] = torch.full_like(value, fill, device="cpu")
    if missing := sorted(set(wanted) - set(state)):
        raise ModelError(
            f"the network does not fit the file: the file lacks its {', '.join(missing[:3])}; build the one that it was made from"
        )
    empty = any(parameter.is_meta for parameter in model.parameters())
    complete = model.state_dict()  # carries the versions of the modules' state, which some networks ask for
    complete.update(_of_its_types(model, state) if empty else state)
    try:
        model.load_state_dict(complete, assign=empty)
    except RuntimeError as error:
        raise ModelError(
            f"the network does not fit the file: {brief(error)}; build the one that it was made from"
        ) from error
    lost = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if lost:
        raise ModelError(
            f"the network has no memory behind {lost[0]}, which no file holds; build it on a device"
        )
    return model.eval()


def _of_its_types(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """`state` for a network without memory, in its types; a tensor that has several names there is one parameter here."""
    from torch import nn

    made: dict[int, nn.Parameter] = {}
    types = {name: value.dtype for name, value in model.state_dict().items()}
    result = {name: value.to(types.get(name, value.dtype)) for name, value in state.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in made:
            made[id(parameter)] = nn.Parameter(result[name], requires_grad=parameter.requires_grad)
        result[name] = made[id(parameter)]
    return result


def _registered(metadata: dict[str, Any], state: dict[str, Any]) -> nn.Module:
    """The network that the file names, which may not be much larger than what the file holds for it."""
    from clipq_ray import models  # torchvision is needed only here

    names = len(state) + len(metadata.get("dropped", []))
    ties = metadata.get("ties", {})  # a tensor counts once, whatever it is called besides
    elements = sum(value.numel() for name, value in state.items() if name not in ties)

    def limit() -> models.Limit:
        return models.Limit(_TENSORS_FREE + 2 * names, _ELEMENTS_FREE + 2 * elements)

    named = metadata.get("architecture")
    if not named:
        raise ModelError("the file names no registered network; pass factory= that builds it")
    try:
        architecture = models.Architecture.from_json(named)
        if model := _without_memory(architecture, limit()):
            return model
        with limit():
            return models.build(architecture)
    except ModelError as error:
        why = _ADVICE.sub("", str(error))
        raise ModelError(f"{why}; pass factory= that builds it") from error


def _without_memory(architecture: models.Architecture, limit: models.Limit) -> nn.Module | None:
    """The network without memory behind its tensors, where all of them come from the file and it can be built so; `ModelError` beyond the limit.

    Otherwise it would be held twice, and drawing the weights that are replaced takes longer than decoding.
    """
    import torch

    from clipq_ray import models

    try:
        with torch.device("meta"), limit:
            model = models.build(architecture)
    except ModelError:  # some compute with their first weights
        if limit.exceeded:
            raise
        return None
    stored = set(model.state_dict())
    return model if all(name in stored for name, _ in model.named_buffers()) else None
