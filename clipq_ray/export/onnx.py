"""A compressed network as ONNX: dense, any batch size, with the input's size and normalisation in the file's metadata.

`torch.onnx` exports; onnxruntime then runs the bytes on random inputs, and outputs that differ from torch's by more than `TOLERANCE` are an
error, so no wrong file is written. The exporter folds a batch norm into the convolution before it: zeros stay zeros, the few levels of a
layer become few levels per row. Not covered: preprocessing inside the graph, networks over 2 GB (one protobuf's limit), other inputs than
one batch of images.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clipq_ray.errors import ConfigError, ModelError
from clipq_ray.export.source import Source

CHECKED_BATCHES = (1, 3)
"""Images at a time in the check; the graph was traced with 2."""
TOLERANCE = 1e-4
"""Outputs by onnxruntime differ from torch's by at most this part of torch's largest output (float32; 1e-6 is usual, measured)."""
INPUT, OUTPUT, BATCH = "input", "output", "batch"
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")  # a terminal's colours, in which the exporter writes


@dataclass(frozen=True)
class Exported:
    """The file, and the largest difference that the check saw, as a part of the largest output."""

    data: bytes
    difference: float


def missing() -> list[str]:
    """The packages of the extra `[export]` that are not installed."""
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


def require() -> None:
    """`ConfigError` where the extra `[export]` is not installed."""
    if absent := missing():
        raise ConfigError(f"ONNX needs {', '.join(absent)}, not installed here: install clipq_ray[export]")


def convert(source: Source) -> Exported:
    """The network as checked ONNX bytes; `ModelError` where it cannot be exported or its outputs differ."""
    shape = (source.packed.metadata.get("input") or {}).get("shape")
    if not shape:
        raise ModelError("expected a file that states its input's size, got none; load it and use torch.onnx")
    network = source.network()
    data = _exported(network, tuple(shape), _properties(source))
    return Exported(data, difference(network, data, tuple(shape)))


def difference(network: nn.Module, data: bytes, shape: tuple[int, ...]) -> float:
    """Largest difference between the outputs of `data` by onnxruntime and of `network`, over the largest output, on random images.

    `ModelError` if it is above `TOLERANCE` or no number. `shape`: (channels, height, width).
    """
    import onnxruntime

    with _translated("opened by onnxruntime"):
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch in CHECKED_BATCHES:
        with (
            _translated(f"checked with {batch} images of {' x '.join(map(str, shape))}"),
            torch.inference_mode(),
        ):
            images = torch.randn(batch, *shape, generator=generator)
            expected = network(images)
            came = torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])
        apart = float((came - expected).abs().max()) if came.shape == expected.shape else float("nan")
        if not apart <= TOLERANCE * float(expected.abs().max()):
            raise ModelError(
                f"expected onnxruntime to give torch's outputs within {TOLERANCE:g} of the largest, got a difference of {apart:.2g} for {batch} images; "
                "report the network, and export safetensors meanwhile"
            )
        worst = max(worst, apart / max(float(expected.abs().max()), torch.finfo(torch.float32).tiny))
    return worst


def _exported(network: nn.Module, shape: tuple[int, ...], properties: dict[str, str]) -> bytes:
    with _translated("exported to ONNX"), _quiet():
        images = torch.zeros(2, *shape)  # a batch of 1 would become a constant of the graph
        program = torch.onnx.export(
            network, (images,), None, input_names=[INPUT], output_names=[OUTPUT], dynamo=True, external_data=False, verbose=False,
            dynamic_shapes=({0: torch.export.Dim(BATCH)},),
        )  # fmt: skip
        assert program is not None
        model: Any = program.model_proto
        _strip(model)
        for key, value in properties.items():
            model.metadata_props.add(key=key, value=value)
        data: bytes = model.SerializeToString(deterministic=True)
    return data


@contextmanager
def _translated(done: str) -> Iterator[None]:
    """Exporter, onnxruntime and network raise whatever they like, for want of memory too."""
    try:
        yield
    except Exception as error:
        raise ModelError(
            f"this network cannot be {done}: {_reason(error)}; export safetensors instead"
        ) from error


def _reason(error: BaseException) -> str:
    """What went wrong first, in one line of 200 characters at most: the exporter wraps that in pages of advice to its own authors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(_ANSI.sub("", str(error)).split())[:200] or type(error).__name__


def _strip(model: Any) -> None:
    """Without the exporter's notes on every node and value: they hold traces with the paths of this machine."""
    del model.metadata_props[:]
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        for place in (graph, *graph.node, *graph.value_info):
            del place.metadata_props[:]
            place.doc_string = ""
    for place in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del place.metadata_props[:]
        place.doc_string = ""


def _properties(source: Source) -> dict[str, str]:
    """What the file says of itself, JSON values as text."""
    metadata = source.packed.metadata
    stated = {
        key: metadata[key] for key in ("architecture", "classes", "class_names", "input") if metadata.get(key)
    }
    return {
        "made_by": "clipq_ray",
        **{f"clipq.{key}": json.dumps(value) for key, value in stated.items()},
        **({"clipq.source_sha256": metadata["source"]} if "source" in metadata else {}),
    }  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings and log lines, which are about its own insides."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
