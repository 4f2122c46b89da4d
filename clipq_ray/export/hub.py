"""A folder in the manner of the Hugging Face Hub: dense weights, the .clq file itself, what builds the network, and a model card.

    model.safetensors   the complete state dict, float32
    model.clq           the original, byte for byte
    config.json         architecture, input size, normalisation, classes
    README.md           the model card

Not covered: uploading; the licence, which is that of the source weights and which the file does not know.
"""

from __future__ import annotations

import json
from typing import Any

from clipq_ray.export import card
from clipq_ray.export.source import Source

WEIGHTS, PACKED, CONFIG, CARD = "model.safetensors", "model.clq", "config.json", "README.md"


def files(source: Source, base_model: str | None = None) -> dict[str, bytes]:
    """The folder's files by name; the card, which describes them, last."""
    weights = source.safetensors(source.complete())
    return {
        WEIGHTS: weights,
        PACKED: source.data,
        CONFIG: (json.dumps(config(source), indent=2, ensure_ascii=False) + "\n").encode(),
        CARD: card.text(source, len(weights), base_model).encode(),
    }


def config(source: Source) -> dict[str, Any]:
    """What builds the network and prepares its images."""
    metadata = source.packed.metadata
    architecture, images = metadata.get("architecture") or {}, source.images
    return {
        "library_name": card.LIBRARY,
        "architecture": architecture.get("name"),
        "architecture_kwargs": architecture.get("kwargs", {}),
        "num_classes": metadata.get("classes"),
        "class_names": metadata.get("class_names", []),
        "input_size": images.get("shape"),
        "resize": images.get("resize"),
        "interpolation": images.get("interpolation", "bilinear"),
        "mean": images.get("mean"),
        "std": images.get("std"),
        "source_sha256": metadata.get("source"),
    }
