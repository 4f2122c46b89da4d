"""One round: what it is asked for, what it is held at, and when it is one that was made; and where the given weights are searched once more."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_choice import TRIALS

from clipq_ray import making, tables
from clipq_ray.aim import LADDER, LEAST_RATIO, Aim
from clipq_ray.batch import compress
from clipq_ray.choice import MILDEST, Choice, choose, choose_for_bytes
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.intent import Drop, Intent, Outcome
from clipq_ray.making import Making
from clipq_ray.progress import Reporter
from clipq_ray.source import Source
from clipq_ray.storage import Store

DROP, TRIED = Intent("max_drop", 0.5), choose_for_bytes(TRIALS, 900)


def test_each_round_is_held_at_what_it_is_asked_for() -> None:
    def held(intent: Intent, requested: int, rungs_left: int, **options: Any) -> int | None:
        source = SimpleNamespace(config=make(**{"hold_size": True, "target_bytes": 1500, **options}))
        one = Making.__new__(Making)
        one.run, one.given = (
            SimpleNamespace(config=source.config, source=source),
            SimpleNamespace(inventory=None),
        )  # type: ignore[assignment]
        one._intent, one.done = intent, []
        size = one.size(requested, rungs_left)
        return size and size.bytes

    size = Intent("bytes", 1500)
    assert held(size, 12000, 3) == 12000
    assert held(size, 2143, 1) == 2143
    assert held(size, 1500, 0) == 1477
    assert held(size, 1500, 0, level_epochs=3) == 1440
    assert held(size, 1400, 0) == 1400
    assert held(Intent("max_drop", 1.0), 1500, 0) is None
    assert held(size, 1500, 0, hold_size=False) is None


def test_what_a_file_holds_besides_layers_is_not_taken_for_their_growth() -> None:
    """Layers of 30,000 bytes that ended at 32,400, and 4,000 for the rest that turned out as 3,000."""
    one = Making.__new__(Making)
    drop = Drop(0.0, 0.0, 0.0, 100)
    outcome = Outcome(34_000, 34_000, 35_400, drop, 1)
    one.done = [SimpleNamespace(outcome=outcome, choice=SimpleNamespace(bytes=30_000))]  # type: ignore[list-item]
    one.other = 3_000
    planned = one.planned(34_500)
    assert planned is not None
    assert planned - one.other < 30_000 * 34_500 / 35_400
    assert one.planned(None) is None


def test_the_same_plan_held_at_another_size_is_another_round() -> None:
    tried = choose_for_bytes(TRIALS, 900)
    one = Making.__new__(Making)
    one.run = SimpleNamespace(config=make(target_bytes=1500, hold_size=True), source=None)  # type: ignore[assignment]
    one.given, one._intent = SimpleNamespace(inventory=None), Intent("bytes", 1500)  # type: ignore[assignment]
    packed = SimpleNamespace(precision=None)
    one.done = [SimpleNamespace(choice=tried, held=3000, on_the_way=True, packed=packed)]  # type: ignore[list-item]
    assert one.made(tried, 3000, 1)
    assert not one.made(tried, 1500, 0)
    assert not one.made(choose_for_bytes(TRIALS, 10**9), 3000, 1)


def test_rounds_behind_the_size_are_short_also_where_rungs_were_left_out() -> None:
    config = make(target_bytes=1500, rungs=4, epochs=20, rung_epochs=3, round_epochs=5, learning_rate=0.1)
    told = [making._schedule(config, *given) for given in ((3, False), (0, False), (0, True))]
    assert [(one.epochs, one.learning_rate) for one in told] == [(3, 0.1), (20, 0.1), (5, 0.05)]


def test_a_promised_drop_is_searched_once_more_where_nothing_mild_enough_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[float] = []
    monkeypatch.setattr(making, "search_once_more", lambda *given: made.append(given[-1]))
    largest = choose_for_bytes(TRIALS, 10**9)
    mildest = choose(TRIALS, MILDEST)
    least = sum(trial.error for trial in mildest.trials.values()) / len(mildest.trials)

    def ratios(
        requested: int | None,
        intent: Intent | None = DROP,
        *,
        original: float = least,
        times: int = 20,
        was: Choice = TRIED,
        plan: Any = None,
    ) -> list[float]:
        """Where a network that is `times` as large as the largest plan is searched; the round before had the plan `was`."""
        made.clear()
        one = Making.__new__(Making)
        searched: Any = SimpleNamespace(trials=TRIALS, error=original, plan=plan)
        given: Any = SimpleNamespace(inventory=SimpleNamespace(bytes_before=times * largest.bytes), groups=())
        run: Any = SimpleNamespace(reporter=Reporter(quiet=True), notes=[], config=make())
        one.run, one.given, one._intent, one._once_more = run, given, intent, False
        one.searched, one.other, one.done = searched, 0, []
        if requested is not None:
            outcome = Outcome(was.bytes, was.bytes, was.bytes, Drop(2.0, 1.0, 3.0, 100), 1)
            one.done = [SimpleNamespace(outcome=outcome, choice=was, held=None, on_the_way=False)]  # type: ignore[list-item]
        one.search_once_more(requested)
        one.search_once_more(requested)  # once
        assert len(one.run.notes) == len(made)
        return list(made)

    # before the first round: by what the mildest points add
    assert ratios(None) == []
    assert ratios(None, original=least - 0.03) == [8.0]
    assert ratios(None, original=least - 0.03, times=12) == [6.0]
    assert ratios(None, Intent("bytes", 1e6), original=least - 0.03) == []
    assert ratios(None, None, original=least - 0.03) == []
    assert ratios(None, original=least - 0.03, plan="compressed already") == []
    # behind one: by what is asked for
    assert ratios(largest.bytes) == []
    assert ratios(round(1.2 * largest.bytes)) == []
    assert ratios(2 * largest.bytes, times=12) == [6.0]
    assert ratios(2 * largest.bytes) == [8.0]  # it lies far out
    assert ratios(4 * largest.bytes, times=7) == [LEAST_RATIO]
    assert ratios(4 * largest.bytes, times=6) == []  # nothing milder can be measured
    # the largest plan was tried, and is not enough
    assert ratios(largest.bytes, was=largest) == []
    assert ratios(round(1.2 * largest.bytes), was=largest, times=9) == [pytest.approx(7.5, abs=0.1)]


def test_a_promise_that_only_a_file_beyond_the_first_search_keeps_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first search measures nothing that leaves the network anything."""
    wanted = Aim(LADDER, (0.99, 0.98, 0.97, 0.96))
    monkeypatch.setattr(Aim, "of", lambda *_: wanted)
    config = make(
        storage=str(tmp_path), engine="local", epochs=2, baseline_epochs=3, batch_size=32, search_evaluations=4, search_start=4,
        search_images=100, round_epochs=1, max_drop=3.0,
    )  # fmt: skip
    result = compress(Source(config), LocalEngine(), Reporter(quiet=True))
    assert result.kept
    assert any("nothing that was measured is mild enough" in note for note in result.manifest["notes"])
    assert [stage["stage"] for stage in result.manifest["stages"]].count("search") == 2
    rows = tables.from_bytes(Store(result.uri).read("trials.parquet")).to_pylist()
    assert len(rows) == 2 * 4 * 5  # none is lost
    assert [row["layer"] for row in rows if row["chosen"]] == [
        row["layer"] for row in rows if row["step"] == 0
    ]
    assert [row["step"] for row in rows[:8]] == list(range(8))
