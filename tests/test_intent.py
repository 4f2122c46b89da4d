"""The promise and what to try next, as pure decisions."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipq_ray.config import make
from clipq_ray.intent import (
    LARGER,
    SMALLER,
    Drop,
    Intent,
    Outcome,
    before_training,
    best,
    keeps,
    next_request,
    rung_sizes,
    sizes_on,
)


def outcome(
    size: int, drop: float = 0.0, requested: int | None = None, predicted: int | None = None
) -> Outcome:
    return Outcome(requested or size, predicted or size, size, Drop(drop, drop - 0.3, drop + 0.3, 1000), 10)


@pytest.mark.parametrize(
    ("options", "kind", "value"),
    [
        ({}, "max_drop", 0.0),
        ({"max_drop": 0.5}, "max_drop", 0.5),
        ({"target_ratio": 16}, "bytes", 62_500),
        ({"target_bytes": 5_000}, "bytes", 5_000),
        ({"tradeoff": 8.0}, "tradeoff", 8.0),
    ],
)
def test_an_intent_is_what_the_options_say_and_no_loss_without_any(
    options: dict[str, float], kind: str, value: float
) -> None:
    assert Intent.of(make(**options), 1_000_000) == Intent(kind, value)  # type: ignore[arg-type]


def test_no_file_is_asked_for_to_have_no_bytes() -> None:
    assert Intent.of(make(target_ratio=10_000), 6_000) == Intent("bytes", 1)


def test_a_drop_is_paired_and_has_an_interval() -> None:
    labels = np.arange(1000) % 10
    reference, found = labels.copy(), labels.copy()
    reference[:100] += 1  # both wrong on 90, the file alone on 30, the reference alone on 10
    found[10:130] += 1
    drop = Drop.between(reference, found, labels)
    assert drop.points == pytest.approx(100 * (30 - 10) / 1000)
    half = (
        1.96 * 100 * math.sqrt((40 / 1000 - 0.02**2) / 1000)
    )  # of the normal interval, which is a little narrower
    assert half < (drop.high - drop.low) / 2 < 1.03 * half
    same = Drop.between(labels, labels, labels)
    assert same.points == 0.0
    assert -0.25 < same.low < 0.0 < same.high < 0.25


@pytest.mark.parametrize(
    ("intent", "kept", "broken"),
    [
        (Intent("max_drop", 0.0), outcome(9, 0.0), outcome(9, 0.01)),
        (Intent("max_drop", 0.5), outcome(9, 0.5), outcome(1, 0.6)),
        (Intent("bytes", 100), outcome(100, 50.0), outcome(101)),
    ],
)
def test_a_promise_is_kept_up_to_its_value(intent: Intent, kept: Outcome, broken: Outcome) -> None:
    assert keeps(intent, kept)
    assert not keeps(intent, broken)


def test_the_smallest_file_that_keeps_the_promise_is_the_best() -> None:
    intent = Intent("max_drop", 0.2)
    assert best(intent, [outcome(90), outcome(60, 0.1), outcome(40, 0.5)]) == 1
    assert best(intent, [outcome(90, 0.9), outcome(60, 0.4), outcome(70, 0.4)]) == 1
    assert best(Intent("bytes", 50), [outcome(80), outcome(60), outcome(70)]) == 1


def test_of_files_within_a_size_the_one_that_loses_least_is_the_best() -> None:
    files = [outcome(120, 0.1), outcome(80, 0.9), outcome(99, 0.4), outcome(98, 0.4)]
    assert best(Intent("bytes", 100), files) == 3


@pytest.mark.parametrize(
    ("outcomes", "following"),
    [
        ([outcome(1000)], 750),
        ([outcome(1000, 0.5)], 1400),
        ([outcome(1000), outcome(700, 0.5)], math.floor(math.sqrt(700_000))),
        ([outcome(1000, 0.5), outcome(1400)], math.floor(math.sqrt(1_400_000))),
        ([outcome(1000), outcome(970, 0.5)], None),  # nothing left between
        ([outcome(1000, 0.5), outcome(900)], 675),  # the larger file's failure says nothing of smaller ones
    ],
)
def test_the_next_size_presses_on_backs_off_or_halves_what_is_between(
    outcomes: list[Outcome], following: int | None
) -> None:
    assert next_request(Intent("max_drop", 0.1), outcomes, 9) == following


def test_a_size_that_is_missed_is_asked_for_again() -> None:
    intent = Intent("bytes", 1000)
    assert next_request(intent, [outcome(1000, 0.5)], 3) is None
    assert next_request(intent, [outcome(800, 0.5)], 3) is None
    assert next_request(intent, [outcome(1100)], 3) == 985
    assert next_request(intent, [outcome(1100)] * 3, 3) is None


@pytest.mark.parametrize(
    ("last", "planned"),
    [
        (None, 1000),
        (outcome(800, predicted=1000), 1250),
        (outcome(1250, predicted=1000), 800),
        (outcome(100, predicted=1000), 1500),  # a network that fell apart says little of the next
        (outcome(900, predicted=100), 666),
    ],
)
def test_a_file_is_planned_as_much_larger_as_the_last_one_shrank(last: Outcome | None, planned: int) -> None:
    assert before_training(1000, last) == planned


def test_rungs_shrink_by_the_same_factor_and_end_at_the_size() -> None:
    assert rung_sizes(16_000, 1_000, 5) == (16_000, 8_000, 4_000, 2_000, 1_000)
    assert rung_sizes(16_000, 1_000, 1) == (1_000,)
    assert rung_sizes(900, 1_000, 5) == (1_000,)  # nothing to climb


def test_rounds_end_with_their_number_and_a_lambda_takes_one() -> None:
    assert next_request(Intent("max_drop", 0.0), [outcome(9)] * 3, 3) is None
    assert next_request(Intent("tradeoff", 4.0), [outcome(9)], 3) is None


@settings(max_examples=200, deadline=None)
@given(
    limit=st.integers(200, 100_000), start=st.integers(200, 100_000), rounds=st.integers(1, 12),
    allowed=st.floats(0.0, 2.0),
)  # fmt: skip
def test_on_a_network_that_loses_more_the_smaller_it_is_the_rounds_close_in(
    limit: int, start: int, rounds: int, allowed: float
) -> None:
    """Files of at least `limit` bytes lose nothing more than what is allowed, smaller ones do."""
    lost: Callable[[int], float] = lambda size: allowed if size >= limit else allowed + 1  # noqa: E731
    intent, asked, seen = Intent("max_drop", allowed), start, list[Outcome]()
    while True:
        seen.append(outcome(asked, lost(asked)))
        following = next_request(intent, seen, rounds)
        if following is None:
            break
        assert following not in [one.bytes for one in seen]
        asked = following
    assert len(seen) <= rounds
    chosen = seen[best(intent, seen)]
    if len(seen) < rounds:
        assert keeps(intent, chosen)
        assert chosen.bytes <= 1.06 * limit + 1


def test_what_became_of_top1_is_said_with_one_sign() -> None:
    assert Drop(0.5, -0.25, 1.25, 400).words() == "-0.50 points (95 %: -1.25 to +0.25)"
    assert Drop(-0.5, -1.25, 0.25, 400).words() == "+0.50 points (95 %: -0.25 to +1.25)"
    assert Drop(0.0, -0.25, 0.25, 400).words() == "+0.00 points (95 %: -0.25 to +0.25)"


def test_a_size_is_gone_on_from_only_while_all_sizes_lie_on_one_side_of_the_promise() -> None:
    intent, kept, broken = Intent("max_drop", 0.5), outcome(900, 0.4), outcome(700, 0.6)

    def sizes(*outcomes: Outcome, wanted: Intent = intent) -> list[int]:
        return list(islice(sizes_on(wanted, outcomes, 1000), 3))

    assert sizes(kept, kept) == [1000, math.ceil(1000 * SMALLER), math.ceil(1000 * SMALLER**2)]
    assert sizes(broken) == [1000, math.ceil(1000 * LARGER), math.ceil(1000 * LARGER**2)]
    assert sizes(kept, broken) == sizes(broken, kept) == sizes() == [1000]
    assert sizes(kept, wanted=Intent("bytes", 800)) == [1000]
    assert list(sizes_on(intent, [kept], 1))[-1] == 1
