"""What a run's files say, where no whole run is needed to know it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from clipq_ray.evaluate import Evaluation
from clipq_ray.results import Scores, _prediction_rows, _score


def evaluation(*predictions: int) -> Evaluation:
    return Evaluation(3, 0.0, 0.0, 0.0, np.array(predictions), np.array([1, 1, 0]))


def test_each_prediction_stands_beside_the_label_that_it_was_held_against() -> None:
    control = {"test": evaluation(0, 1, 2)}
    scores = Scores({"test": evaluation(1, 1, 1)}, control, {"test": evaluation(1, 0, 0)})
    rows = _prediction_rows(scores)
    assert [row["label"] for row in rows] == [1, 1, 0]
    assert [(row["original"], row["control"], row["compressed"]) for row in rows] == [
        (1, 0, 1),
        (1, 1, 0),
        (1, 2, 0),
    ]
    assert {
        row["control"] for row in _prediction_rows(Scores(scores.original, {"test": None}, scores.compressed))
    } == {None}


def test_a_loss_that_is_no_number_is_null_where_json_knows_none() -> None:
    assert [
        _score(replace(evaluation(1, 1, 0), loss=loss))["loss"] for loss in (0.5, math.nan, math.inf)
    ] == [  # type: ignore[index]
        0.5,
        None,
        None,
    ]
