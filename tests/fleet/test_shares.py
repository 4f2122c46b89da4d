"""One intent for an ensemble: its members get unequal shares that lose less than equal ones, and its promise is of all of them together."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from data_files import partly_unreadable
from test_fleet_run import DEFAULTS, ROOT, fleet, rows, submitted
from test_rounds import Hot

import clipq_ray
from clipq_ray import planning, search
from clipq_ray.batch import compress_all
from clipq_ray.choice import Choice, choose_for_bytes
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import make
from clipq_ray.data import open_data
from clipq_ray.errors import ClipqError, DataError, DivergedError, HeldError, ModelError, RunError
from clipq_ray.evaluate import evaluate
from clipq_ray.fleet.ensembles import classes_of, probabilities, together
from clipq_ray.fleet.file import Ensemble
from clipq_ray.fleet.shares import (
    Curves,
    Joining,
    Share,
    _Vote,
    as_members,
    first_budget,
    shared_out,
    without,
)
from clipq_ray.intent import Drop, Intent, Outcome, next_request
from clipq_ray.pipeline import Result
from clipq_ray.progress import Reporter
from clipq_ray.source import Source
from clipq_ray.stages import Run
from clipq_ray.storage import Store

assert ROOT
MEMBERS = [{"model": "lenet5"}, {"model": "lenet_300_100"}]
OWN = {name: value for name, value in DEFAULTS.items() if name != "target_ratio"}


def trial(layer: str, step: int, error: float, size: int, elements: int, whole: int) -> search.Trial:
    return search.Trial(
        layer, step, "start", 0.5, 3, 100, error, error, size, (4 * elements - size) / whole, 8.0, 0.1, "here"
    )


def curves(errors: list[float], whole: int) -> Curves:
    """A member of one layer, whose points take 400, 200, 100 bytes with these errors."""
    points = [trial("w", step, error, 400 >> step, whole // 4, whole) for step, error in enumerate(errors)]
    return Curves({"w": points}, 0.0, whole, 10)


def test_bytes_go_where_they_remove_the_most_error() -> None:
    robust, tender = curves([0.00, 0.01, 0.02], 4000), curves([0.00, 0.20, 0.40], 2000)
    shares = shared_out([robust, tender], 520)
    assert [one.bytes for one in shares] == [110, 410]
    assert sum(one.added for one in shares) == pytest.approx(0.02)
    # equal shares would have been 210 each
    assert sum(choose_for_bytes(one.trials, 250).trials["w"].error for one in (robust, tender)) > 0.2


def test_a_budget_that_is_too_small_gets_the_smallest_shares() -> None:
    assert [one.bytes for one in shared_out([curves([0, 0.1, 0.2], 4000)] * 2, 5)] == [110, 110]


def test_a_byte_has_one_price_although_members_differ_in_size() -> None:
    """Equal curves of error over bytes get equal shares, whatever the size of the networks."""
    shares = shared_out([curves([0.0, 0.1, 0.3], 4000), curves([0.0, 0.1, 0.3], 40_000)], 420)
    assert [one.bytes for one in shares] == [210, 210]


@pytest.mark.parametrize(
    ("wants", "smaller"),
    [(("target_ratio", 8.0), 8.0), (("target_bytes", 61_706.0), 8.0), (("max_drop", 0.5), None)],
)
def test_members_are_searched_where_the_size_of_all_together_is_decided(
    wants: tuple[str, float], smaller: float | None
) -> None:
    """Two networks of 61,706 parameters each."""

    def members(seed: int) -> list[Source]:
        joining = [Joining.of(Source(make(model="lenet5", name=name, seed=seed))) for name in "ab"]
        return as_members(Ensemble("both", ("a", "b"), wants), joining)

    found = members(0)
    assert [one.smaller for one in found] == [pytest.approx(smaller, rel=1e-3) if smaller else None] * 2
    assert len({one.ensemble for one in found}) == 1
    assert found[0].ensemble != members(1)[0].ensemble


def test_votes_are_held_against_the_labels_of_the_images_that_were_read(tmp_path: Path) -> None:
    split = open_data(
        partly_unreadable(tmp_path), input_shape=(3, 8, 8), memory_limit_bytes=1000, bad_image_limit=2
    ).test
    assert split is not None
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    steps: list[tuple[int, int, str]] = []
    votes, labels = probabilities(
        Source(make(evaluation_batch_size=7)), model, split, lambda *step: steps.append(step)
    )
    found = evaluate(model, split, batch_size=7)
    assert steps[-1] == (len(steps), len(steps), f"{len(split)} images")
    assert votes.argmax(axis=1).tolist() == found.predictions.tolist()
    assert labels.tolist() == found.labels.tolist() != split.labels.tolist()


def test_members_with_other_classes_have_no_vote_together() -> None:
    vote = Ensemble("vote", ("a", "b"))
    assert together(vote, vote.members, [np.full((3, 4), 0.25), np.eye(3, 4)]).argmax(axis=1).tolist() == [
        0,
        1,
        2,
    ]
    with pytest.raises(DataError, match="same number of outputs, got a with 4, b with 5; leave some out"):
        together(vote, vote.members, [np.zeros((3, 4)), np.zeros((3, 5))])


def test_the_first_budget_of_a_drop_is_the_smallest_that_may_be_recovered() -> None:
    found = first_budget(
        Intent("max_drop", 0.0), [curves([0.0, 0.03, 0.2], 4000), curves([0.0, 0.02, 0.3], 4000)]
    )
    assert found == 2 * 210
    assert first_budget(Intent("bytes", 1234.5), []) == 1215


class Voting(_Vote):
    """An ensemble whose members only do what a test says, each as in a thread of its own."""

    def __init__(self, intent: Intent, count: int) -> None:
        source = Source(make(limit_images=20, engine="local"))
        runs = [
            Run(source, LocalEngine(), Reporter(quiet=True), Store("memory://vote"), threading.Lock())
        ] * count
        self._members: Any = [SimpleNamespace(run=run) for run in runs]
        self._making: Any = [SimpleNamespace(make=lambda *_: None, most_bytes=None) for _ in runs]
        self._intent, self._turn, self._parallel = intent, runs[0].turn, True


def test_a_member_that_fails_leaves_no_training_of_another_one_behind() -> None:
    vote = Voting(Intent("bytes", 100), 2)
    ended: list[int] = []

    def step(number: int) -> None:
        with vote._members[number].run.away():
            if number == 0:
                raise RunError("diverged")
            time.sleep(0.5)
            ended.append(number)

    with vote._turn, pytest.raises(RunError, match="diverged"):
        vote._each(step, range(2))
    assert ended == [1]


def test_levels_that_are_trained_behind_a_members_round_have_its_share_of_the_size() -> None:
    vote = Voting(Intent("bytes", 1000), 2)
    shares = [Share(Choice(1.0, {}), size, 0.0) for size in (300, 600)]
    with vote._turn:
        vote._made(shares, Intent("bytes", 1000), 900)
    assert [making.most_bytes for making in vote._making] == [333, 666]
    drop = Voting(Intent("max_drop", 1.0), 2)
    with drop._turn:
        drop._made(shares, Intent("max_drop", 1.0), 900)
    assert [making.most_bytes for making in drop._making] == [None, None]


def test_a_member_that_follows_what_the_others_state_has_the_limit_that_it_had() -> None:
    left = Voting(Intent("bytes", 7), 1)  # the other one is committed
    left._names, left._curves = ["b"], [curves([0.0, 0.1], 4000)]
    of = {name: {"requested_bytes": size, "steps": {}} for name, size in (("a", 300), ("b", 600))}
    with left._turn:
        left.again({"intent": "bytes", "value": 1000, "rounds": [{"tradeoff": 1.0, "shares": of}]})
    # what the curves say of the share by now may be other bytes than were known then
    assert [making.most_bytes for making in left._making] == [600 * 1000 // 900]


def test_one_that_diverges_hides_no_claim_that_another_one_lost() -> None:
    vote = Voting(Intent("bytes", 100), 2)

    def step(number: int) -> None:
        raise (DivergedError, HeldError)[number]("member ended")

    with vote._turn, pytest.raises(HeldError):
        vote._each(step, range(2))


class Member:
    """A member in whose files layers take what was planned, and the rest `real` bytes instead of the `other` that were predicted."""

    def __init__(self, other: int, real: int) -> None:
        self.other, self.real, self.most_bytes = other, real, None
        self.done: list[Any] = []

    def make(self, choice: Choice, requested: int) -> None:
        size, drop = choice.bytes + self.real, Drop(0.0, -0.1, 0.1, 20)
        outcome = Outcome(requested, choice.bytes + self.other, size, drop, 1)
        self.done.append(SimpleNamespace(choice=choice, packed=SimpleNamespace(file=b""), outcome=outcome))
        self.other = self.real


class Alone(Voting):
    """An ensemble of one such member with a layer of these points, whose votes are always right."""

    def __init__(self, intent: Intent, sizes: range | list[int], member: Member) -> None:
        super().__init__(intent, 1)
        points = [trial("w", step, step / 1e4, size, 50_000, 400_000) for step, size in enumerate(sizes)]
        self._curves = [Curves({"w": points}, 0.0, 400_000, member.other)]
        self._making, self._names, self._ensemble = [member], ["a"], Ensemble("vote", ("a",))
        self._opened: Any = [SimpleNamespace(prepared=self._members[0], control=None)]

    def _reference(self) -> Any:
        return np.eye(20, 3), np.zeros(20, np.int64)


def test_what_the_files_hold_besides_layers_is_known_behind_the_first_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """5,000 bytes were predicted and 11,000 found: with one and the other by turns the third round was the first one again."""
    shares = "clipq_ray.fleet.shares"
    monkeypatch.setattr(f"{shares}.loading.from_bytes", lambda *_, **__: None)
    monkeypatch.setattr(f"{shares}.probabilities", lambda *_: (np.eye(20, 3), None))
    vote = Alone(Intent("bytes", 40_000), range(36_000, 20_000, -100), Member(5_000, 11_000))
    with vote._turn:
        document = vote.rounds()
    assert document["kept"]
    assert [one["bytes"] for one in document["rounds"]] == [45_400, 39_400]
    assert [one["predicted_bytes"] for one in document["rounds"]] == [39_400, 39_400]
    again = Alone(Intent("bytes", 40_000), range(36_000, 20_000, -100), Member(5_000, 11_000))
    with again._turn:
        again.again(document)
    made = [[one.outcome for one in each._making[0].done] for each in (vote, again)]
    assert made[0] == made[1]
    assert vote._making[0].most_bytes == again._making[0].most_bytes


@pytest.mark.parametrize(
    ("sizes", "left", "why"),
    [
        ([100], None, ": the search has no other point in that direction"),
        ([100, 80, 60], -1.0, " before --deadline-hours"),
    ],
)
def test_rounds_that_end_without_a_kept_promise_before_their_number_say_why(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], left: float | None, why: str
) -> None:
    shares = "clipq_ray.fleet.shares"
    monkeypatch.setattr(f"{shares}.loading.from_bytes", lambda *_, **__: None)
    monkeypatch.setattr(f"{shares}.probabilities", lambda *_: (np.eye(20, 3), None))
    monkeypatch.setattr(Run, "seconds_left", property(lambda self: left))
    vote = Alone(Intent("bytes", 85), sizes, Member(0, 10))
    with vote._turn:
        document = vote.rounds()
    assert (document["kept"], len(document["rounds"])) == (False, 1)
    assert vote._members[0].run.notes == [f"no further round of ensemble vote{why}"]


def test_between_a_kept_and_a_broken_size_nothing_outside_of_them_is_tried() -> None:
    """It went on from the last round alone: behind a broken one past the kept size, behind a kept one below the broken size."""
    vote = Alone(Intent("max_drop", 1.0), [800, 400, 200, 100, 50], Member(0, 0))
    kept, broken = (
        Outcome(size, size, size, Drop(points, points - 1, points + 1, 500), 1)
        for size, points in ((200, 0.5), (100, 1.5))
    )
    for sizes in ([kept, broken], [broken, kept]):
        vote._making[0].done.clear()
        before = [shared_out(vote._curves, one.bytes) for one in sizes]
        for shares in before:
            vote._making[0].make(shares[0].choice, shares[0].bytes)
        requested = next_request(vote._intent, sizes, 5)
        assert requested is not None
        assert vote._other(requested, before, sizes)[0] is None
    # on one side of it the next one further on is
    vote._making[0].done.clear()
    vote._making[0].make(before[1][0].choice, 200)
    found, _ = vote._other(200, before[1:], [kept])
    assert found is not None
    assert found[0].bytes == 100


def told(folder: Path) -> dict[str, Any]:
    (found,) = json.loads((folder / "s" / "fleet=night" / "manifest.json").read_text())["ensembles"]
    return dict(found)


def voting(folder: Path, wants: dict[str, Any], **more: Any) -> Path:
    vote = [{"name": "vote", "members": ["lenet5", "lenet_300_100"], **wants}]
    return fleet(folder, MEMBERS, ensembles=vote, defaults={**OWN, "storage": str(folder / "s"), **more})


@pytest.fixture(scope="module")
def by_bytes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("bytes")
    return folder, submitted(voting(folder, {"target_bytes": 60_000}, rounds=2))


def test_bytes_in_total_are_kept_by_unequal_shares_that_lose_less_than_equal_ones(
    by_bytes: tuple[Path, Any],
) -> None:
    folder, ended = by_bytes
    assert ended.returncode == 0, ended.stderr
    promise, found = told(folder)["promise"], rows(folder)
    assert promise["kept"]
    assert sum(row["bytes"] for row in found.values()) == promise["bytes"] <= 60_000
    shares = promise["rounds"][promise["round"] - 1]["shares"]
    assert {name: row["bytes"] for name, row in found.items()} == {
        n: one["bytes"] for n, one in shares.items()
    }
    assert shares["lenet_300_100"]["requested_bytes"] != shares["lenet5"]["requested_bytes"]
    added = sum(one["added_error_points"] for one in shares.values())
    assert added <= equal_split(folder, 60_000) + 1e-9
    assert "promise: at most 60,000 bytes together: kept" in ended.stdout
    assert "lenet5: promise: ensemble vote: at most 60,000 bytes together: kept" in ended.stdout


def equal_split(folder: Path, budget: int) -> float:
    """What the measured points of both members add in error [points] with half of the budget for each."""
    added = 0.0
    for store in sorted((folder / "s" / "_stages").glob("search-*")):
        trials = {
            rows[0]["layer"]: [search.Trial(**row) for row in rows]
            for rows in (json.loads(path.read_text()) for path in store.glob("group-*.json"))
        }
        choice = choose_for_bytes(trials, budget // 2)
        least = {layer: min(t.error for t in points) for layer, points in trials.items()}
        added += 100 * sum(t.error - least[layer] for layer, t in choice.trials.items())
    return added


def test_a_second_submission_redoes_nothing_and_says_the_same(by_bytes: tuple[Path, Any]) -> None:
    folder, _ = by_bytes
    before = told(folder)
    again = submitted(folder / "fleet.yaml")
    assert again.returncode == 0
    assert again.stderr.count("is committed already") == 2
    assert told(folder) == before


def test_a_dry_run_knows_what_an_ensemble_has_committed(by_bytes: tuple[Path, Any]) -> None:
    said = submitted(by_bytes[0] / "fleet.yaml", "--dry-run").stdout
    assert "2 committed already, 0 to make" in said


def test_a_member_that_was_not_committed_follows_what_the_others_state(by_bytes: tuple[Path, Any]) -> None:
    folder, _ = by_bytes
    (stated,) = (folder / "s" / "model=lenet5").glob("run=*/manifest.json")
    digest = json.loads(stated.read_text())["files"]["model.clq"]["sha256"]
    before = told(folder)
    stated.unlink()
    again = submitted(folder / "fleet.yaml")
    assert again.returncode == 0, again.stderr
    assert "finetune: already there, reused" in again.stderr
    assert json.loads(stated.read_text())["files"]["model.clq"]["sha256"] == digest
    assert told(folder) == before


def test_a_drop_is_that_of_the_vote_of_the_decoded_files_on_validation_images(tmp_path: Path) -> None:
    ended = submitted(voting(tmp_path, {"max_drop": 1.0}, rounds=3))
    promise = told(tmp_path)["promise"]
    assert ended.returncode == (0 if promise["kept"] else 1)
    assert 1 <= len(promise["rounds"]) <= 3
    assert promise["kept"] == (promise["drop_points"] <= 1.0)
    data = open_data("digits", input_shape=(1, 28, 28)).validation
    images, labels = data.batch(torch.arange(len(data)), None)
    votes = torch.zeros(len(data), 10, dtype=torch.float64)
    for name, row in rows(tmp_path).items():
        network = clipq_ray.load(f"{tmp_path / 's'}/model={name}/run={row['run']}")
        with torch.inference_mode():
            votes += torch.softmax(network(images).double(), dim=1)
    right = 100 * float((votes.argmax(dim=1) == labels).double().mean())
    assert promise["validation_images"] == len(data)
    reference = promise["drop_points"] + right
    assert 0 <= reference <= 100
    assert reference * len(data) / 100 == pytest.approx(round(reference * len(data) / 100))


def test_a_member_that_fails_ends_the_others_of_its_ensemble_and_nobody_else(tmp_path: Path) -> None:
    models = [
        {"model": "lenet5"},
        {"model": "lenet_300_100", "weights": "nowhere.pt"},
        {"model": "lenet5", "name": "other"},
    ]
    vote = [{"name": "vote", "members": ["lenet5", "lenet_300_100"], "target_ratio": 15}]
    ended = submitted(
        fleet(tmp_path, models, ensembles=vote, defaults={**DEFAULTS, "storage": str(tmp_path / "s")})
    )
    assert ended.returncode == 1
    found = rows(tmp_path)
    assert [found[name]["status"] for name in ("lenet5", "lenet_300_100", "other")] == [
        "failed",
        "failed",
        "committed",
    ]
    assert (
        "its ensemble vote has one intent for all members, and lenet_300_100 failed"
        in found["lenet5"]["error"]
    )


def voted(folder: Path, number: int) -> list[Result | ClipqError]:
    """Two members with one intent, where the `number`-th round of the second one diverges."""
    given = {**OWN, "storage": str(folder), "rounds": 3}
    sources = [Source(make(**given, **one)) for one in MEMBERS]
    ensemble = Ensemble("vote", tuple(source.name for source in sources), ("max_drop", 3.0))
    return compress_all(sources, Hot(number, "lenet_300_100"), Reporter(quiet=True), [ensemble])


def test_a_members_round_that_diverges_leaves_the_round_that_all_have(tmp_path: Path) -> None:
    for ended in voted(tmp_path, 1):
        assert isinstance(ended, DivergedError)
    assert not list(tmp_path.glob("model=*/run=*/manifest.json"))
    files: list[dict[str, Any]] = []
    for _ in range(2):
        for ended in voted(tmp_path, 2):
            assert isinstance(ended, Result)
            promise = ended.manifest["promise"]
            # the first member has made another one, with which nobody votes
            assert len(promise["rounds"]) == len(promise["ensemble"]["rounds"]) == 1
            assert promise["round"] == promise["ensemble"]["round"] == 1
            assert ended.manifest["metrics"]["bytes_after"] == promise["rounds"][0]["bytes"]
            files.append(ended.manifest["files"]["model.clq"])
        (said,) = [note for note in ended.manifest["notes"] if "diverged" in note]
        assert said.startswith(
            "round 2 of ensemble vote came to nothing with lenet_300_100 and no round follows it, the files are those of round 1: finetune diverged"
        )
        for one in tmp_path.glob("model=lenet5/run=*/manifest.json"):  # it follows what the other one states
            one.unlink()
    assert files[:2] == files[2:]


def test_votes_that_are_no_numbers_are_for_no_class() -> None:
    votes = np.array([[0.1, 0.9], [math.nan, 0.2], [0.7, 0.3]])
    assert classes_of(votes).tolist() == [1, -1, 0]


def test_a_member_that_cannot_be_built_ends_its_ensemble_and_no_other_network(tmp_path: Path) -> None:
    def source(name: str, **options: Any) -> Source:
        return Source(
            make(
                model="lenet5",
                name=name,
                storage=str(tmp_path),
                search_evaluations=4,
                epochs=1,
                engine="local",
                **options,
            )
        )

    sources = [source("a", model_args={"nonsense": 1}), source("b"), source("c", target_ratio=20)]
    ensembles = [Ensemble("both", ("a", "b"), ("target_ratio", 8.0))]
    words, code = planning.dry_run(sources, ensembles)
    assert code == 2
    assert "a cannot be made" in words
    assert "b cannot be made" in words
    assert "network     c (lenet5)" in words
    found = compress_all(sources, LocalEngine(), Reporter(quiet=True), ensembles)
    assert [type(one) for one in found] == [ModelError, RunError, Result]


def test_members_of_an_ensemble_are_told_why_the_others_are_not_made() -> None:
    vote = Ensemble("vote", ("one", "two", "three"), ("max_drop", 1.0))
    left: dict[str, ClipqError] = {"one": HeldError("another job's"), "two": HeldError("another job's")}
    assert str(without(vote, left)).endswith("another job makes one, two; run again when it has ended")
    assert str(without(vote, {**left, "two": RunError("broke")})).endswith(
        "one, two failed; run again when that is mended"
    )
