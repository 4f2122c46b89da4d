"""A search looks where the size is decided that it serves: at its lambdas, from first points that lose as much as that size does."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from clipq_ray.aim import LADDER, MILD, MILD_RATIO, START, START_RATIO, STEEP, Aim, ladder, shares
from clipq_ray.config import make


@pytest.mark.parametrize(
    ("wanted", "aim"),
    [
        ({"target_ratio": 20}, Aim(LADDER, START)),
        ({"target_ratio": 150}, Aim(LADDER, START)),
        ({"target_ratio": 170}, Aim(LADDER + STEEP, START)),
        ({"target_bytes": 1000}, Aim(LADDER + STEEP, START)),
        ({"target_bytes": 1000, "search_again": True}, Aim(LADDER + STEEP, START)),
        ({"target_bytes": 1000, "rungs": 4}, Aim(LADDER + STEEP, START)),
        # others serve the steep ones
        ({"target_bytes": 1000, "rungs": 4, "search_again": True}, Aim(LADDER, START)),
        ({"target_ratio": 14}, Aim(LADDER, shares(14))),
        ({"target_ratio": 6}, Aim(MILD, shares(6))),
        ({"target_ratio": 6, "rungs": 4, "search_again": True}, Aim(MILD, shares(6))),
        ({"target_bytes": 105_000}, Aim(MILD, shares(8))),
        ({"tradeoff": 30.0}, Aim(LADDER, START)),
        ({"tradeoff": 100.0}, Aim(LADDER + STEEP, START)),
        ({"tradeoff": 0.5}, Aim(MILD, shares(MILD_RATIO / 2))),
        ({"max_drop": 0.5}, Aim()),
    ],
)
def test_the_search_before_all_rounds_looks_where_the_size_is_decided_that_it_serves(
    wanted: dict[str, Any], aim: Aim
) -> None:
    assert Aim.of(make(model="lenet5", data="digits", **wanted), 840_000) == aim


def test_lambdas_grow_with_the_ratio() -> None:
    found = [ladder(ratio) for ratio in (4.0, MILD_RATIO, 160.0, 161.0)]
    assert found == [MILD, LADDER, LADDER, LADDER + STEEP]
    assert list(LADDER + STEEP) == sorted(LADDER + STEEP)
    assert min(MILD) < min(LADDER) < max(MILD) < max(LADDER)


def test_first_points_lose_less_of_networks_that_may_be_larger() -> None:
    assert shares(START_RATIO) == shares(400.0) == START
    for milder, ratio in pairwise((4.0, 6.0, 8.0, 12.0, START_RATIO)):
        assert all(less < more for less, more in zip(shares(milder), shares(ratio), strict=True))
    # a bit more for each weight is a fourth of the loss
    assert shares(32 / 3) == pytest.approx([share / 4 for share in START])


def test_a_member_of_an_ensemble_is_searched_where_that_is_decided() -> None:
    config = make(model="lenet5", data="digits")
    assert Aim.of(config, 840_000, together=6.0) == Aim.at(6.0)
    assert Aim.of(config, 840_000, together=None) == Aim()
