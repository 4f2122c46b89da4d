"""Networks that vote together: top-1 of their averaged probabilities, of the originals and of the decoded files, on the same images.

Members may differ in everything but the images that they are judged on: the test set, or the validation images where there is none. Nothing
is decided here. Not covered: one intent for an ensemble as a whole (`shares`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from clipq_ray import loading, logs
from clipq_ray.data import Split, batches
from clipq_ray.errors import ClipqError, DataError, HeldError, brief
from clipq_ray.evaluate import NO_CLASS, Forward, evaluating
from clipq_ray.finetune import Progress
from clipq_ray.fleet.file import Ensemble
from clipq_ray.intent import Drop
from clipq_ray.pipeline import Result
from clipq_ray.progress import Reporter
from clipq_ray.redaction import redacted
from clipq_ray.source import Source
from clipq_ray.states import put_state, read_state
from clipq_ray.storage import Store, stage_store
from clipq_ray.work import prepare_process

Votes = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Member:
    """One network of an ensemble and its committed run."""

    source: Source
    result: Result


def classes_of(votes: Votes) -> npt.NDArray[np.int64]:
    """The class of the most votes of each image, float64 (n, classes) -> int64 (n,); `NO_CLASS` where they are not numbers."""
    return np.where(np.isnan(votes).any(axis=1), NO_CLASS, votes.argmax(axis=1))


def scored(ensemble: Ensemble, members: Sequence[Member], reporter: Reporter) -> dict[str, Any]:
    """What the members score together before and after, as a JSON object; `DataError` where they are not judged on the same images."""
    votes: dict[str, list[Votes]] = {"original": [], "compressed": []}
    labels: npt.NDArray[np.int64] | None = None
    split = "test"
    for member in members:
        prepare_process(member.source.config.threads_per_worker)
        data = member.source.data()
        images, split = (data.test, "test") if data.test is not None else (data.validation, "validation")
        for name, network in (("original", _original), ("compressed", _decoded)):
            with reporter.about(f"ensemble {ensemble.name}").stage(
                f"vote of {member.source.name}, {name}"
            ) as progress:
                vote, found = probabilities(member.source, network(member), images, progress)
            votes[name].append(vote)
            if labels is not None and not np.array_equal(labels, found):
                raise DataError(
                    f"ensemble {ensemble.name}: expected all members to be judged on the same images, got others for {member.source.name}; "
                    "give them the same data options"
                )
            labels = found
    assert labels is not None
    names = [member.source.name for member in members]
    original, compressed = (classes_of(together(ensemble, names, votes[name])) for name in votes)
    drop = Drop.between(original, compressed, labels)
    before, after = (
        sum(one.result.manifest["metrics"][name] for one in members)
        for name in ("bytes_before", "bytes_after")
    )
    return {
        "name": ensemble.name, "members": list(ensemble.members), "split": split, "images": len(labels),
        "top1_before_percent": 100 * float((original == labels).mean()), "top1_percent": 100 * float((compressed == labels).mean()),
        "drop_points": drop.points, "drop_low_points": drop.low, "drop_high_points": drop.high,
        "bytes_before": before, "bytes": after, "ratio": before / after,
        **({"promise": members[0].result.manifest["promise"]["ensemble"]} if ensemble.wants else {}),
    }  # fmt: skip


def together(ensemble: Ensemble, names: Sequence[str], votes: Sequence[Votes]) -> Votes:
    """The sum of the members' probabilities, (n, classes); `DataError` where they have different classes."""
    classes = [one.shape[1] for one in votes]
    if len(set(classes)) > 1:
        got = ", ".join(f"{name} with {n}" for name, n in zip(names, classes, strict=True))
        raise DataError(
            f"ensemble {ensemble.name}: expected members with the same number of outputs, got {got}; leave some out"
        )
    return sum(votes[1:], votes[0])


def _original(member: Member) -> nn.Module:
    """The given network, from the stage that the run names."""
    (key,) = (one["key"] for one in member.result.manifest["stages"] if one["stage"] == "baseline")
    store = stage_store(Store(member.source.config.storage), "baseline", key)
    model = member.source.network()
    put_state(model, read_state(store))
    return model


def _decoded(member: Member) -> nn.Module:
    model: nn.Module = loading.load(member.result.uri, factory=member.source.network)
    return model


@torch.inference_mode()
def probabilities(
    source: Source, model: nn.Module, images: Split, progress: Progress
) -> tuple[Votes, npt.NDArray[np.int64]]:
    """Softmax of the network's class scores on all images, float64 (n, classes), and their labels, int64 (n,), as `Evaluation` has them."""
    model = model.to(source.device())
    forward, parts = (
        Forward(model, source.device()),
        torch.arange(len(images)).split(source.config.evaluation_batch_size),
    )
    found = []
    with evaluating(model):
        for done, (pixels, labels) in enumerate(batches(images, parts, lambda step: None), 1):
            found.append((torch.softmax(forward(pixels).double(), dim=1).numpy(), labels.numpy()))
            progress(done, len(parts), f"{len(images):,} images")
    votes, labels = zip(*found, strict=True)
    return np.concatenate(votes), np.concatenate(labels)


def all_scored(
    ensembles: Sequence[Ensemble], sources: Sequence[Source], results: Sequence[Any], reporter: Reporter
) -> list[dict[str, Any]]:
    """Every ensemble, or why it has no score."""
    by_name = dict(zip((source.name for source in sources), zip(sources, results, strict=True), strict=True))
    found = []
    for ensemble in ensembles:
        missing = [name for name in ensemble.members if not isinstance(by_name[name][1], Result)]
        if missing:
            held = all(isinstance(by_name[name][1], HeldError) for name in missing)
            names = ", ".join(missing)
            found.append(_unscored(ensemble, f"another job makes {names}" if held else f"{names} failed"))
            continue
        try:
            found.append(scored(ensemble, [Member(*by_name[name]) for name in ensemble.members], reporter))
        except Exception as error:  # the fleet is written whatever becomes of a vote, of anybody's networks
            known = isinstance(error, ClipqError)
            words = redacted(brief(error, None)) if known else logs.unexpected(error)
            found.append(_unscored(ensemble, words))
    return found


def _unscored(ensemble: Ensemble, why: str) -> dict[str, Any]:
    return {"name": ensemble.name, "members": list(ensemble.members), "error": why}
