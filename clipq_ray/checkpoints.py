"""Where a training keeps what it needs to go on: one whole object per epoch, safetensors with the state as JSON in its header.

Not covered: what is kept (`finetune`).
"""

from __future__ import annotations

import json
import logging
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from clipq_ray.errors import FormatError, brief
from clipq_ray.memory import Attempts
from clipq_ray.storage import Store

log = logging.getLogger(__name__)


class Checkpoints:
    """Checkpoints of one training in a store: one whole object per epoch, the last two kept."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def attempts(self, stage: str) -> Attempts:
        """The attempts at the training that these belong to."""
        return Attempts(self._store, stage)

    def save(self, epoch: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write the state after `epoch` (counted from 1); the same epoch again writes the same name."""
        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        self._store.write(_checkpoint_name(epoch), save_tensors(plain, metadata={"state": json.dumps(state)}))
        for name in self._store.names("epoch-")[:-2]:
            self._store.remove(name)

    def latest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last epoch's tensors and state, or None; of the epoch before where that is damaged, `FormatError` where both are."""
        names = self._store.names("epoch-")
        for name in reversed(names):
            data = self._store.read(name)
            try:
                header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
                return load_tensors(data), json.loads(header["__metadata__"]["state"])
            except (ValueError, KeyError, TypeError, SafetensorError) as error:
                log.warning("%s/%s is damaged (%s)", self._store.uri, name, brief(error, 100))
        if names:
            raise FormatError(
                f"expected a checkpoint in {self._store.uri}, got damaged ones ({', '.join(names)}); remove them, and the training begins anew"
            )
        return None


def _checkpoint_name(epoch: int) -> str:
    return f"epoch-{epoch:05d}.safetensors"
