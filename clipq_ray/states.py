"""The tensors of a network by name: into a network, to a store and back. Not covered: weights that a user gives (`models.weights`), packed files (`loading`)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from clipq_ray.errors import FormatError, StorageError
from clipq_ray.storage import Store

WEIGHTS = "weights.safetensors"


def put_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy all tensors of a network of this kind into `model`, wherever it lies; `RuntimeError` where names or shapes are others.

    Stored tensors have lost the version numbers of the modules' state, without which some networks (torchvision's MNASNet) refuse them or take them for those of
    an older version: the model's own stand for them.
    """
    complete: OrderedDict[str, Tensor] = OrderedDict(state)
    complete._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(complete)


def write_state(store: Store, name: str, state: Mapping[str, Tensor]) -> None:
    """A state dict as one safetensors object; tensors that share memory are written once each."""
    store.write(
        name, save_tensors({key: value.detach().cpu().contiguous().clone() for key, value in state.items()})
    )


def read_state(store: Store, name: str = WEIGHTS) -> dict[str, Tensor]:
    """The mirror of `write_state`; `FormatError` where there is none: `store` is of a stage that was finished."""
    try:
        return dict(load_tensors(store.read(name)))
    except (ValueError, SafetensorError) as error:
        raise _lost(store, name, str(error)) from error
    except StorageError as error:
        if store.exists(name):
            raise
        raise _lost(store, name, "no object") from error


def _lost(store: Store, name: str, got: str) -> FormatError:
    # all of it: what says that the stage is finished would stay, and the object would be missed for ever
    return FormatError(
        f"expected safetensors at {store.uri}/{name}, got {got}; remove {store.uri} and run again"
    )
