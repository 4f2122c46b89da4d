"""The model of the error and the expected improvement; every part by itself."""

from __future__ import annotations

import numpy as np
import pytest

from clipq_ray.acquisition import (
    Candidates,
    Point,
    _relax,
    _stretch,
    predicted_error,
    propose,
    start_point,
    stretched_rate,
)
from clipq_ray.plan import Theta

THETAS = tuple(Theta(p / 20, b) for b in (2, 3, 4, 6) for p in range(20))


def distortion(theta: Theta) -> float:
    return theta.p**2 + (1 - theta.p**2) / 4**theta.b


def error(theta: Theta) -> float:
    return min(0.9, 1.5 * distortion(theta) ** 2)


def saved(theta: Theta) -> float:
    return 0.5 - (1 - theta.p) * theta.b / 64


ALL = Candidates(
    THETAS, np.array([saved(theta) for theta in THETAS]), np.array([distortion(theta) for theta in THETAS])
)


def points(thetas: tuple[Theta, ...], images: int = 1000) -> list[Point]:
    return [
        Point(
            theta,
            round(error(theta) * images) / images,
            -np.log(1 - error(theta)),
            images,
            saved(theta),
            distortion(theta),
        )
        for theta in thetas
    ]


MEASURED = points((Theta(0.0, 4), Theta(0.5, 3), Theta(0.7, 2), Theta(0.9, 4), Theta(0.25, 2)))
FREE = ALL.without({point.theta for point in MEASURED})


def test_what_is_measured_is_no_candidate() -> None:
    assert len(FREE.thetas) == len(ALL.thetas) - 5 == len(FREE.saved) == len(FREE.distortion)
    assert not {point.theta for point in MEASURED} & set(FREE.thetas)
    assert list(FREE.saved) == [saved(theta) for theta in FREE.thetas]


@pytest.mark.parametrize("most", [0.02, 0.1, 0.5, 0.9])
def test_a_start_point_saves_the_most_at_a_distortion(most: float) -> None:
    found = THETAS[start_point(ALL, most)]
    assert distortion(found) <= most
    assert all(saved(theta) <= saved(found) for theta in THETAS if distortion(theta) <= most)


def test_where_every_point_is_too_hard_the_mildest_is_taken() -> None:
    assert start_point(ALL, 0.0) == int(np.argmin(ALL.distortion))


@pytest.mark.parametrize(("mean", "deviation"), [(0.3, 0.0), (0.05, 0.1), (0.8, 0.3), (1.5, 0.2)])
def test_an_error_comes_back_from_its_scale_with_mean_and_deviation(mean: float, deviation: float) -> None:
    drawn = np.sin(mean + deviation * np.random.default_rng(0).standard_normal(400_000)) ** 2
    found = _relax(np.array([mean]), np.array([deviation]))
    assert found[0][0] == pytest.approx(drawn.mean(), abs=2e-3)
    assert found[1][0] == pytest.approx(drawn.std(), abs=2e-3)


def test_noise_is_the_same_at_every_error() -> None:
    drawn = np.random.default_rng(0)
    for rate in (0.1, 0.5, 0.8):
        counts = drawn.binomial(400, rate, 20_000)
        assert _stretch(counts / 400).var() == pytest.approx(1 / (4 * 400), rel=0.1)


def test_near_1_rates_lie_apart_by_what_they_leave() -> None:
    rates = [step / 100 for step in range(100)] + [0.991, 0.995, 0.999]
    found = [stretched_rate(p) for p in rates]
    assert found == sorted(found)
    assert found[:96] == rates[:96]
    assert stretched_rate(0.9995) - stretched_rate(0.995) == pytest.approx(
        stretched_rate(0.995) - stretched_rate(0.95)
    )
    # no kink
    assert stretched_rate(0.9501) - stretched_rate(0.95) == pytest.approx(0.0001, rel=0.01)


@pytest.mark.parametrize("loss_share", [0.0, 0.5])
def test_the_error_is_predicted_between_the_points(loss_share: float) -> None:
    mean, deviation = predicted_error(MEASURED, FREE, loss_share, 0)
    truth = np.array([error(theta) for theta in FREE.thetas])
    assert np.abs(mean - truth).mean() < 0.1
    assert (np.abs(mean - truth) <= 3 * deviation + 0.05).mean() > 0.9
    assert (deviation > 0).all()


def test_a_loss_that_is_no_number_is_that_of_a_network_that_knows_nothing() -> None:
    def predicted(loss: float) -> list[np.ndarray]:
        broken = [*MEASURED[:3], MEASURED[3]._replace(loss=loss), MEASURED[4]]
        return list(predicted_error(broken, FREE, 0.5, 0))

    found = predicted(float("nan"))
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, predicted(float("inf")))
    np.testing.assert_allclose(found, predicted(1e3))


def test_fewer_images_leave_more_doubt() -> None:
    few, many = (
        predicted_error([point._replace(images=images) for point in MEASURED], FREE, 0.0, 0)[1]
        for images in (50, 50_000)
    )
    assert few.min() > 1.5 * many.min()  # next to a measured point


def test_a_proposal_is_the_best_expectation_at_its_lambda() -> None:
    mild = propose(MEASURED, FREE, (0.1, 30.0), 0, 0.5, 0)
    hard = propose(MEASURED, FREE, (0.1, 30.0), 1, 0.5, 0)
    assert (mild.tradeoff, hard.tradeoff) == (0.1, 30.0)
    assert saved(FREE.thetas[mild.index]) < saved(FREE.thetas[hard.index])
    assert mild.gain == hard.gain > 0.0  # of all lambdas
    assert propose(MEASURED, FREE, (0.1, 30.0), 0, 0.5, 0) == mild


def test_the_loss_steadies_errors_on_few_images() -> None:
    truth = np.array([error(theta) for theta in FREE.thetas])
    missed: dict[float, list[float]] = {0.0: [], 0.5: []}
    for seed in range(6):
        drawn = np.random.default_rng(seed)
        noisy = [point._replace(error=drawn.binomial(40, point.error) / 40, images=40) for point in MEASURED]
        for share, values in missed.items():
            values.append(float(np.abs(predicted_error(noisy, FREE, share, 0)[0] - truth).mean()))
    assert np.mean(missed[0.5]) < np.mean(missed[0.0])
