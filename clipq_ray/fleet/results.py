"""What the networks of a job give together: a row each in `models.parquet`, totals, a page, and the fleet's manifest.

`{storage}/fleet={name}/` is written anew whenever the fleet is submitted: it says which run of which network is the fleet's, or why there is
none; a job that leaves networks to another one leaves this to it too. The runs themselves never change. Not covered: what a run says about itself (`results`).
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from clipq_ray import manifest, report, tables
from clipq_ray.errors import ClipqError, RunError, StorageError, brief
from clipq_ray.identity import versions
from clipq_ray.pipeline import Result
from clipq_ray.redaction import redacted
from clipq_ray.source import Source
from clipq_ray.storage import MODELS, REPORT, Store, fleet_store

Outcome = Result | ClipqError


def row(source: Source, found: Outcome) -> dict[str, Any]:
    """One network of the fleet as a row of `tables.MODELS`."""
    same = {"model": source.name, "network": source.config.model}
    if isinstance(found, ClipqError):
        empty = dict.fromkeys(name for name in tables.MODELS.names if name not in same)
        return {**empty, **same, "status": "failed", "error": redacted(brief(found, None))}
    document = found.manifest
    metrics, promise = document["metrics"], document["promise"]
    promised = promise["intent"] != "tradeoff"
    split = "test" if metrics["test"] else "validation"
    scores = metrics[split]
    return {
        **same, "status": "committed", "error": None, "run": document["run"], "reused": found.reused, "kept": promise["kept"] if promised else None, "promise": promise["words"] if promised else None,
        "parameters": metrics["parameters"], "bytes_before": metrics["bytes_before"], "bytes": metrics["bytes_after"], "ratio": metrics["ratio"],
        "split": split, "images": scores["n"], "top1_before_percent": scores["original"]["top1_percent"],
        "top1_percent": scores["compressed"]["top1_percent"], "drop_points": promise["drop_points"], "seconds": document["seconds"],
    }  # fmt: skip


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over all networks that are committed."""
    done = [one for one in rows if one["status"] == "committed"]
    before, after = (sum(one[name] for one in done) for name in ("bytes_before", "bytes"))
    return {
        "networks": len(rows), "committed": len(done), "failed": len(rows) - len(done), "promises": sum(one["kept"] is not None for one in done), "promises_kept": sum(bool(one["kept"]) for one in done),
        "bytes_before": before, "bytes": after, "ratio": before / after if after else None,
    }  # fmt: skip


def write(
    storage: Store,
    name: str,
    sources: Sequence[Source],
    found: Sequence[Outcome],
    ensembles: Sequence[Mapping[str, Any]] = (),
) -> Store:
    """Store the table and the manifest of a fleet, over those of an earlier submission; `ensembles` as scored."""
    rows = [row(source, one) for source, one in zip(sources, found, strict=True)]
    store = fleet_store(storage, name)
    document = {
        "format": manifest.FORMAT, "fleet": name, "versions": versions(), "totals": totals(rows),
        "created_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "runs": {one["model"]: one["run"] for one in rows if one["run"]},
        "failed": {one["model"]: one["error"] for one in rows if one["error"]},
        "ensembles": [dict(one) for one in ensembles],
    }  # fmt: skip
    files = {MODELS: tables.to_bytes(rows, tables.MODELS)}
    if not report.missing():
        files[REPORT] = report.render_fleet(document, rows).encode()
    try:
        manifest.replace(store, files, document)
    except StorageError as error:
        raise RunError(
            f"the fleet's table cannot be written: {error}; its runs are kept: the same command again writes it"
        ) from error
    return store
