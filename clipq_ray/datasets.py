"""The tables of all committed runs of a storage, each kind as one dataset. Not covered: their columns (`tables`), and which runs are committed (`manifest`)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from clipq_ray.errors import StorageError
from clipq_ray.manifest import committed_among
from clipq_ray.storage import LAYERS, TRIALS, Store

if TYPE_CHECKING:
    import pyarrow.dataset as ds


def open_layers(storage: str | os.PathLike[str] | Store) -> ds.Dataset:
    """The layer tables of all committed runs as one `pyarrow.dataset.Dataset`: the columns of `tables.LAYERS`, then model and run."""
    return _open(storage, LAYERS, "layers")


def open_trials(storage: str | os.PathLike[str] | Store) -> ds.Dataset:
    """The search evaluations of all committed runs as one dataset: the columns of `tables.TRIALS`, then model and run."""
    return _open(storage, TRIALS, "trials")


def _open(storage: str | os.PathLike[str] | Store, name: str, table: str) -> ds.Dataset:
    """Rows of exactly these files: a run that is committed while a reader works is seen by the next `open`."""
    # the package's public names are looked up without pyarrow
    import pyarrow as pa
    import pyarrow.dataset as ds

    from clipq_ray import tables

    store = storage if isinstance(storage, Store) else Store(storage)
    if store.local is not None and not store.local.is_dir():
        raise StorageError(f"expected a storage with runs at {store.uri}, got no directory; check the URI")
    listed = store.names("model=")
    inside = {f"model={run.model}/run={run.run}/{name}" for run in committed_among(store, listed)}
    filesystem, root = store.arrow()
    # A run whose plan was given has no trials.
    paths = [f"{root.rstrip('/')}/{path}" for path in listed if path in inside]
    whole = pa.schema([*tables.SCHEMAS[table], *tables.PARTITIONS])
    if not paths:
        return ds.dataset(whole.empty_table())
    return ds.dataset(
        paths,
        schema=whole,
        format="parquet",
        filesystem=filesystem,
        partitioning=ds.partitioning(tables.PARTITIONS, flavor="hive"),
        partition_base_dir=root,
    )
