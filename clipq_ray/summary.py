"""The table that a person reads at the end of a job, and the size that a ratio is relative to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clipq_ray import codec
from clipq_ray.intent import Drop

_HEADINGS: tuple[str, ...] = (
    "network", "parameters", "bytes before", "bytes after", "ratio", "top-1 before", "top-1 after", "images",
)  # fmt: skip


def bytes_before(file: bytes) -> int:
    """4 bytes x all elements in a .clq file: what the network took before (method, section 5)."""
    return 4 * sum(entry.elements for entry in codec.entries(file))


def table(manifests: Sequence[Mapping[str, Any]], uris: Sequence[str], failed: Sequence[str] = ()) -> str:
    """One row per run: network, parameters, bytes before and after, ratio, top-1 before and after; the names of those that `failed`; totals of several;
    then where each lies."""
    rows, lines = [_HEADINGS], []
    for manifest, uri in zip(manifests, uris, strict=True):
        about = f"{manifest['model']}: " if len(manifests) + len(failed) > 1 else ""
        rows.append(_row(manifest))
        if control := _scores(manifest)[1]["control"]:
            lines.append(f"dense control of {manifest['model']}: top-1 {control['top1_percent']:.2f} %")
        if promise := manifest.get("promise"):
            lines.append(f"{about}{promise_line(promise)}")
        lines.append(f"{about}run: {uri}")
        lines += [f"{about}note: {note}" for note in manifest["notes"]]
    rows += [(name, "failed", "", "", "", "", "", "") for name in failed]
    if len(manifests) > 1:
        rows.append(_total(manifests))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], "", *lines])


def _scores(manifest: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Of test images, or of validation images where there are none: which, and what they say."""
    split = "test" if manifest["metrics"]["test"] else "validation"
    return split, manifest["metrics"][split]


def _row(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    metrics = manifest["metrics"]
    split, scores = _scores(manifest)
    return (
        manifest["model"],
        f"{metrics['parameters']:,}",
        f"{metrics['bytes_before']:,}",
        f"{metrics['bytes_after']:,}",
        f"{metrics['ratio']:.1f}x",
        f"{scores['original']['top1_percent']:.2f} %",
        f"{scores['compressed']['top1_percent']:.2f} %",
        f"{scores['n']:,} {split}",
    )


def _total(manifests: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    parameters, before, after = (
        sum(one["metrics"][name] for one in manifests)
        for name in ("parameters", "bytes_before", "bytes_after")
    )
    ratio = f"{before / after:.1f}x"
    return (f"all {len(manifests)}", f"{parameters:,}", f"{before:,}", f"{after:,}", ratio, "", "", "")


def promise_line(promise: Mapping[str, Any]) -> str:
    """What was promised, whether it is kept, and how sure that is."""
    told = f"{promise['words']}: {'kept' if promise['kept'] else 'NOT KEPT'}"
    if promise["intent"] == "tradeoff":
        told = f"none, {promise['words']} was given"
    drop = Drop(
        promise["drop_points"],
        promise["drop_low_points"],
        promise["drop_high_points"],
        promise["validation_images"],
    )
    return (
        f"promise: {told}; validation top-1 {drop.words()} against the {promise['reference']} "
        f"on {drop.n:,} images, round {promise['round']} of {len(promise['rounds'])}"
    )


def ensemble_line(found: Mapping[str, Any]) -> str:
    """One ensemble, as a person would say it."""
    if "error" in found:
        return f"ensemble {found['name']}: not scored, {found['error']}"
    told = (
        f"ensemble {found['name']} ({', '.join(found['members'])}): {found['bytes_before']:,} to {found['bytes']:,} bytes ({found['ratio']:.1f}x), "
        f"top-1 {found['top1_before_percent']:.2f} to {found['top1_percent']:.2f} % on {found['images']:,} {found['split']} images, "
        f"{Drop(found['drop_points'], found['drop_low_points'], found['drop_high_points'], found['images']).words()}"
    )
    if promise := found.get("promise"):
        shares = promise["rounds"][promise["round"] - 1]["shares"]
        drop = Drop(
            promise["drop_points"],
            promise["drop_low_points"],
            promise["drop_high_points"],
            promise["validation_images"],
        )
        told += (
            f"\n  promise: {promise['words']}: {'kept' if promise['kept'] else 'NOT KEPT'}; validation top-1 {drop.words()} against the {promise['reference']}, "
            f"round {promise['round']} of {len(promise['rounds'])}; "
            + ", ".join(
                f"{name} {share['bytes']:,} of {share['requested_bytes']:,} bytes"
                for name, share in shares.items()
            )
        )
    return told
