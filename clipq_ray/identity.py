"""What decides a run and a stage: two of them with the same inputs, versions and machine type are the same one.

Keys are hashes of JSON. Where things lie and how many trials run at a time decide nothing and are left out. Not covered: whether a stored
output is whole (`storage`, `manifest`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from clipq_ray import manifest, models
from clipq_ray.aim import Aim
from clipq_ray.config import Config
from clipq_ray.data import Data
from clipq_ray.errors import StorageError
from clipq_ray.precision import autocast_dtype
from clipq_ray.source import Source
from clipq_ray.storage import MANIFEST, Store, run_store

STAGE_VERSIONS = {"baseline": 5, "search": 11, "finetune": 9, "levels": 7, "control": 5}
"""Raised when a change of the code changes what a stage makes of the same inputs; where a size is held, "finetune" depends on how a file is packed too."""

DECIDES_NOTHING = {
    "storage", "name", "force", "paper", "on_claim", "dry_run", "engine", "search_parallel", "trainings", "limit_cpus", "limit_gpus", "max_failures", "stall_minutes",
    "attempt_hours", "min_workers", "data", "data_root", "weights",
    "interpolation", "validation_data", "memory_limit_gib", "expect_top1_percent", "search_cache_gib", "search_gpu_share", "decode", "decode_cpus",
}  # fmt: skip
"""Options that are not part of a run's identity; weights and data count by their content."""

_VERSIONED = (
    "clipq_ray",
    "torch",
    "torchvision",
    "numpy",
    "constriction",
    "bayesian-optimization",
    "ray",
    "pyarrow",
    "pillow",
)


_COMPUTES = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "numba",
    "scikit-learn",
    "constriction",
    "bayesian-optimization",
    "pillow",
)
"""What computes a stage's outputs, and the pixels that it sees."""


def versions() -> dict[str, str]:
    """Installed versions of what decides a result."""
    return _installed(_VERSIONED)


def _installed(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def of_data(data: Data) -> list[Any]:
    """What decides training: the images that train and decide, and how they are prepared."""
    found = [data.train.fingerprint, data.validation.fingerprint, data.preprocessing.to_json()]
    in_colour = data.preprocessing.input_shape[0] == 3
    # gray images for a network of three channels were mirrored before
    return [*found, "not mirrored"] if in_colour and not getattr(data.train, "mirrored", True) else found


def of_network(source: Source) -> dict[str, Any]:
    """What decides the network but its weights: name and arguments where it is registered, else what it computes as well."""
    architecture = source.architecture()
    if architecture is None:
        assert source.module is not None
        named = {"name": None, "module": repr(type(source.module))}
    else:
        named = architecture.to_json()
    return {**named, "definition": source.definition} if source.definition else named


def of_start(source: Source) -> str | None:
    """What decides where a network that is trained first begins: the seed alone where this package makes it, else the values that it came with."""
    return models.weights_sha256(source.network().state_dict()) if source.definition else None


def of_run(source: Source, data: Data, state: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """What decides a run: weights (`state`; None: trained first), data, configuration without where and how fast."""
    options = source.config.model_dump(mode="json")
    return {
        "architecture": of_network(source),
        "weights": models.weights_sha256(state) if state is not None else ["trained", of_start(source)],
        "control": source.wants_control(),
        "data": of_data(data),
        "class_names": list(data.class_names),
        "test": data.test.fingerprint if data.test else None,
        "config": {name: value for name, value in options.items() if name not in DECIDES_NOTHING},
        **_platform(source.config),
        "versions": STAGE_VERSIONS,
        **({"ensemble": source.ensemble} if source.ensemble else {}),
        **({"frozen": source.frozen} if source.frozen else {}),
    }


def of_ensemble(
    intent: str, value: float, members: Mapping[str, Mapping[str, Any]], aim: Aim | None = None
) -> str:
    """What decides the members' shares of one intent: it, all that decides each member, and where they are searched."""
    elsewhere = {"aim": asdict(aim)} if aim not in (None, Aim()) else {}
    return _sha256({"intent": intent, "value": value, "members": members, **elsewhere})


def stage_key(stage: str, config: Config, inputs: Mapping[str, Any]) -> str:
    """16 hex digits for the outputs of `stage` on `inputs`."""
    platform = _platform(config)
    if stage == "search":  # a trial is one process, however many train
        platform = {name: value for name, value in platform.items() if name not in ("workers", "min_workers")}
    elif config.workers > 2:
        # gradients of three and more were added in another order in the first step of each attempt before
        platform["first_step"] = "settled"
    return _sha256({"stage": stage, "version": STAGE_VERSIONS[stage], **platform, **inputs})[:16]


def run_id(
    storage: Store, name: str, inputs: Mapping[str, Any], *, force: bool
) -> tuple[str, dict[str, Any] | None]:
    """The run's id, and its manifest if it is committed; with `force` the first id that is not."""
    base = "r-" + _sha256(inputs)[:12]
    for attempt in range(1, 10_000):
        candidate = base if attempt == 1 else f"{base}-{attempt}"
        store = run_store(storage, name, candidate)
        if not store.exists(MANIFEST):
            return candidate, None
        if not force:
            return candidate, manifest.read_manifest(store)
    raise StorageError(
        f"expected fewer than 10,000 forced runs of {base} in {storage.uri}; use another --storage"
    )


def _platform(config: Config) -> dict[str, Any]:
    """What besides inputs decides bytes: versions, threads, world size, the fewest workers where that may change, and what "auto" is on this machine; of a
    cluster with machines of another type, that of the job's own."""
    elastic = config.fewest_workers < config.workers
    return {
        **({"min_workers": config.fewest_workers} if elastic else {}),
        "libraries": _installed(_COMPUTES),
        "threads": config.threads_per_worker,
        "workers": config.workers,
        "device": config.device,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if config.device != "cpu" and torch.cuda.is_available() else None,
        "autocast": str(autocast_dtype(config.precision, torch.device("cpu"))),
    }


def _sha256(inputs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
