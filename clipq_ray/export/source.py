"""What is exported: a packed network's bytes and content, and what its run says where there is one. Not covered: evaluating it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import torch as safetensors
from torch import Tensor, nn

from clipq_ray import codec, loading, manifest
from clipq_ray.codec.header import ELEMENTS_FREE, ELEMENTS_PER_BYTE
from clipq_ray.errors import ArtifactError, ModelError
from clipq_ray.storage import Store

_RESERVED = "__metadata__"
"""The key of a safetensors header that is no tensor: a tensor of that name makes a file that nobody reads."""


@dataclass(frozen=True)
class Source:
    """A .clq file: `data` its bytes, `packed` what is in them, `run` the manifest if it was given as a run directory."""

    data: bytes
    packed: codec.Packed
    run: dict[str, Any] | None = None

    @classmethod
    def read(cls, uri: str | os.PathLike[str]) -> Source:
        """The file or the committed run at `uri`."""
        data = loading.read_file(uri)
        run = None if loading.file_at(uri) else manifest.read_manifest(Store(uri))
        return cls(data, codec.decode(data), run)

    @property
    def name(self) -> str:
        """The run's name of the network, else its architecture's."""
        named = (self.packed.metadata.get("architecture") or {}).get("name", "network")
        return str(self.run["model"] if self.run and "model" in self.run else named)

    @property
    def images(self) -> dict[str, Any]:
        """How images are prepared; `mean` and `std` None where nobody stated them: of a caller's own loaders the file has pixels as they came."""
        stated: dict[str, Any] = dict(self.packed.metadata.get("input") or {})
        plain = (
            stated and stated["resize"] is None and not any(stated["mean"]) and set(stated["std"]) == {1.0}
        )
        said = ((self.run or {}).get("config") or {}).get(
            "mean"
        )  # of a network of the user's own that is named
        if plain and said is None and not self.packed.metadata.get("architecture"):
            stated |= {"mean": None, "std": None}
        return stated

    def network(self) -> nn.Module:
        """The network in eval mode; `ModelError` where the file names no registered architecture."""
        if not self.packed.metadata.get("architecture"):
            raise ModelError(
                "expected a file that names a registered network, got one made with a factory; export it as safetensors or folder"
            )
        return loading.from_bytes(self.data)

    def stored(self) -> dict[str, Tensor]:
        """The file's tensors, tied ones under each name; `ArtifactError` where these would be larger than a file of its bytes may be."""
        state = loading.state_dict(self.data)
        # Tied tensors share memory here and cost the header nothing, but take memory for each name in what is written.
        elements = sum(value.numel() for value in state.values())
        if elements > (most := ELEMENTS_FREE + ELEMENTS_PER_BYTE * len(self.data)):
            raise ArtifactError(
                f"expected at most {most} elements in a file of {len(self.data)} bytes, got {elements} with tied tensors under each name; "
                "fetch the file again or make it anew"
            )
        return state

    def complete(self) -> dict[str, Tensor]:
        """What the network's `load_state_dict` takes: counters that inference does not read are zero, dropped parameters left out."""
        if not self.packed.metadata.get("architecture"):
            return self.stored()
        dropped = set(self.packed.metadata.get("dropped", ()))
        return {name: value for name, value in self.network().state_dict().items() if name not in dropped}

    @staticmethod
    def safetensors(state: Mapping[str, Tensor]) -> bytes:
        """The tensors as a safetensors file; `ModelError` where one has a name that the format keeps for itself."""
        if _RESERVED in state:
            raise ModelError(
                f"expected tensors with names that safetensors can hold, got {_RESERVED}; rename it in the network and compress that"
            )
        # Copies: the format refuses tensors that share memory, as tied weights do.
        copies = {name: value.detach().clone().contiguous() for name, value in state.items()}
        data: bytes = safetensors.save(copies, metadata={"format": "pt"})
        return data
