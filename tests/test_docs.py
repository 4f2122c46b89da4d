"""docs/scale.md is arithmetic on options and benches: it changes when they do."""

from __future__ import annotations

import json
import re
from pathlib import Path

from clipq_ray import claims
from clipq_ray.config import make

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_the_search_of_a_resnet50_is_what_options_and_bench_say() -> None:
    config = make(model="resnet50")
    rows = json.loads((ROOT / "bench" / "results" / "search_cost.json").read_text())["rows"]
    found = {row["name"]: row["value"] for row in rows}
    layers = int(found["search/resnet50-random-weights/layers"])
    less = found["search/resnet50-random-weights/whole_over_kept"]
    evaluations = layers * config.search_evaluations
    assert f"{layers} layers x {config.search_evaluations} evaluations x {config.search_images:,} images, {less:.2f} times less" in PAGE  # fmt: skip
    assert f"| evaluations | {evaluations} | {10 * evaluations:,} |" in PAGE
    assert f"| {evaluations * config.search_images / less / 1e6:.1f} M forward |" in PAGE


def test_the_trainings_are_what_the_options_say() -> None:
    config = make(model="resnet50")
    images = 1_281_167 - 5_000
    assert f"| dense control | {config.epochs} epochs x {images / 1e6:.3f} M" in PAGE
    assert f"{config.epochs * images / 1e6:.1f} M |" in PAGE
    assert f"{2 * config.epochs * images / 1e6:.0f}e6 / t" in PAGE


def test_costs_follow_from_the_formula() -> None:
    rows = re.findall(
        r"\| \d \w+ \| ([\d.]+) \| ([\d,]+) \| ([\d.]+) \(([\d.]+)\) \| (\d+) \((\d+)\) \|", PAGE
    )
    assert len(rows) == 3
    for dollars, speed, *said in rows:
        for images, hours, cost in ((76.5e6, said[0], said[2]), (51e6, said[1], said[3])):
            expected = images / float(speed.replace(",", "")) / 3600
            assert abs(float(hours) - expected) / expected < 0.03
            assert abs(int(cost) - expected * float(dollars)) <= 1


def test_requests_and_trials_are_those_of_the_bench() -> None:
    rows = json.loads((ROOT / "bench" / "results" / "scale.json").read_text())["rows"]
    found = {row["name"]: row["value"] for row in rows}
    writes = [found[f"scale/s3/write/{one}"] for one in ("per_evaluation", "per_epoch", "rest_of_a_run")]
    assert (
        f"{writes[0]:.2f} writes per evaluation, {writes[1]:.0f} per epoch and {writes[2]:.0f} for the"
        in PAGE
    )
    total = 972 * writes[0] + 60 * writes[1] + writes[2]
    beats = 3600 / claims.BEAT_SECONDS
    assert (
        f"| S3 writes | {round(total, -2):,.0f}, and {beats:.0f} per hour: {round(total + 47 * beats, -1):,.0f} |"
        in PAGE
    )
    assert f"{found['scale/tune/seconds_per_trial']:.2f} s per trial" in PAGE
    assert f"{found['scale/tune/state_bytes_per_trial'] / 1000:.1f} KB per trial" in PAGE
