"""From Python what the job does from the command line: on a named network, or on a caller's own module and loaders."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from clipq_ray import seeds
from clipq_ray.batch import compress as run_pipeline
from clipq_ray.cluster.engine import Engine, LocalEngine
from clipq_ray.config import Config, make
from clipq_ray.data import from_loaders
from clipq_ray.errors import ConfigError
from clipq_ray.pipeline import Result
from clipq_ray.precision import own_float32
from clipq_ray.progress import Reporter
from clipq_ray.source import Source, let_data_go

OF_OPENED_DATA = (
    "data", "data_root", "validation_data", "limit_images", "mean", "std", "resize", "interpolation", "input_size", "shift_pixels", "bad_image_limit",
)  # fmt: skip
"""Options of data that is opened by name or URI, which a caller's own loaders know nothing of."""


def compress(
    model: nn.Module | None = None,
    train_loader: DataLoader[Any] | None = None,
    validation_loader: DataLoader[Any] | None = None,
    test_loader: DataLoader[Any] | None = None,
    *,
    quiet: bool = False,
    **options: Any,
) -> Result:
    """Compress a network and commit the run to `storage`.

    `model`: a trained module; without it `options` name the network (`model_name=` or the default), as on the command line. With `weights="train"` it is trained
    first, from the values that it has: seed them, or no later call goes on behind it. What has no `requires_grad` is compressed and not fine-tuned. It gets
    images alone, in training mode too, and returns class scores (n, classes): alone, first of a tuple, or as `logits`; a copy of it is worked on.
    `train_loader`, `validation_loader`, `test_loader`: loaders over map-style datasets that give (image float32 (c, h, w), label int);
    their datasets and collate functions are used, their order is not. Without a validation loader, images are held out of training. Options that say how
    data is opened are refused beside them.
    `options`: the fields of `clipq_ray.config.Config`, e.g. `target_ratio=15, epochs=10, storage="runs", engine="local"`.

    Returns the run's URI and manifest. torch's threads, cudnn's settings, the precision of float32 and all global random states are the caller's own again
    afterwards. Errors: those of `clipq_ray.errors`.
    """
    if train_loader is None and (validation_loader is not None or test_loader is not None):
        raise ConfigError(
            "expected a train_loader with a validation_loader or test_loader, got none; give both or neither"
        )
    if (model is None) != (train_loader is None):
        raise ConfigError(
            "expected a module together with a train_loader, got one of them; give both or neither"
        )
    if model is not None and not isinstance(model, nn.Module):
        raise ConfigError(
            f"expected a torch.nn.Module as model, got {type(model).__name__}; name a network of a registry by model_name="
        )
    name = options.pop("model_name", None) or (_name_of(model) if model is not None else None)
    config = make(**({"model": name} if name else {}), **options)
    if config.dry_run:
        raise ConfigError(
            "expected dry_run on the command line only (jobs/compress.py --dry-run); leave it out"
        )
    own_data = None
    if train_loader is not None:
        usual = make()
        if unused := [name for name in OF_OPENED_DATA if getattr(config, name) != getattr(usual, name)]:
            raise ConfigError(
                f"expected images as the loaders give them, got {' and '.join(unused)} as well; leave it out, or prepare the images in the dataset"
            )
        own_data = from_loaders(
            train_loader,
            validation_loader,
            test_loader,
            seed=config.seed,
            validation_images=config.validation_images,
        )
    source = Source(config, model, own_data)
    with _own_process(), make_engine(config) as engine:
        return run_pipeline(source, engine, Reporter(quiet=quiet))


def _name_of(model: nn.Module) -> str:
    """What the result of a caller's own module is called, unless its options say so: its class, as names in a storage may be."""
    ascii_only = (
        unicodedata.normalize("NFKD", type(model).__name__.lower()).encode("ascii", "ignore").decode()
    )
    return ascii_only.strip("_") or "network"


@contextmanager
def _own_process() -> Iterator[None]:
    """What a run sets for the whole process (`work.prepare_process`, `seeds.everywhere`) is afterwards what it was before."""
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    benchmark, deterministic = cudnn.benchmark, cudnn.deterministic
    try:
        with own_float32(), _own_random_states():
            yield
    finally:
        let_data_go()
        torch.set_num_threads(threads)
        cudnn.benchmark, cudnn.deterministic = benchmark, deterministic


@contextmanager
def _own_random_states() -> Iterator[None]:
    """Python's, numpy's and torch's global random states afterwards as before, on GPUs too."""
    # a process that has not used its GPUs yet holds no state of them, and to ask for one would take their memory
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    seed = torch.random.initial_seed()
    try:
        with seeds.kept():
            yield
    finally:
        if on_gpus is None:
            torch.cuda.manual_seed_all(seed)  # as they would begin
        else:
            torch.cuda.set_rng_state_all(on_gpus)


def make_engine(config: Config) -> Engine:
    """The engine that a job wants; `ConfigError` where Ray is not installed."""
    if config.engine == "local":
        return LocalEngine()
    try:
        from clipq_ray.cluster.on_ray import RayEngine
    except ImportError as error:
        raise ConfigError(
            f"--engine ray: expected Ray, got {error}; install clipq_ray[cluster] or use --engine local"
        ) from error
    return RayEngine(config)
