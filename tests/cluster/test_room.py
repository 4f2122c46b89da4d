"""A job takes no more than it may, trainings find their workers although trials wait, and who waits holds nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import pytest

from clipq_ray.cluster.room import NOTHING, UNLIMITED, Amount, Group, Room
from clipq_ray.errors import RunError

ONE = Amount(1)


class Desk:
    """A cluster that is told what is in use, and places what is asked for when told to."""

    def __init__(self, cpus: float, gpus: float = 0.0) -> None:
        self.free, self.all = Amount(cpus, gpus), dict[str, Group]()

    def available(self) -> Amount:
        return self.free

    def groups(self) -> Mapping[str, Group]:
        return dict(self.all)

    def place(self, name: str, *bundles: Amount, training: bool = False) -> None:
        self.all[name] = Group(True, training, bundles)
        self.free = self.free - sum(bundles, Amount())

    def remove(self, name: str) -> None:
        self.free = self.free + sum(self.all.pop(name).bundles, Amount())


def until(what: Callable[[], bool]) -> None:
    limit = time.monotonic() + 120
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.01)


class Going:
    """Trainings in threads of their own."""

    def __init__(self, room: Room) -> None:
        self._room, self._ends, self._threads = room, dict[str, threading.Event](), list[threading.Thread]()
        self.let_in: list[str] = []

    def start(
        self, name: str, worker: Amount, workers: int = 1, rank: int = 0, beside: Amount = NOTHING
    ) -> None:
        self._ends[name] = threading.Event()

        def go() -> None:
            with self._room.training(worker, workers, (rank,), beside):
                self.let_in.append(name)
                self._ends[name].wait(120)

        self._threads.append(threading.Thread(target=go))
        self._threads[-1].start()

    def end(self, name: str) -> None:
        self._ends[name].set()

    def join(self) -> None:
        for end in self._ends.values():
            end.set()
        for thread in self._threads:
            thread.join(20)


@contextmanager
def going(room: Room) -> Iterator[Going]:
    made = Going(room)
    try:
        yield made
    finally:
        made.join()


def test_trials_are_let_in_as_far_as_the_cluster_and_the_limits_go() -> None:
    desk = Desk(8)
    room = Room(desk, Amount(5), searches=3)
    assert [room.begin(number, ONE) for number in range(5)] == [True, True, True, False, False]
    assert [Room(desk, Amount(2)).begin(0, Amount(3)), Room(Desk(1)).begin(0, ONE)] == [False, True]
    few = Room(Desk(2))
    assert [few.begin(number, ONE) for number in range(3)] == [True, True, False]


def test_one_request_is_open_on_a_cluster_that_may_grow() -> None:
    """Its autoscaler must see that more is wanted; all others wait here."""
    desk = Desk(1)
    room = Room(desk, grows=True)
    assert [room.begin(number, ONE) for number in range(2)] == [True, False]
    desk.place("a", ONE)
    room.runs(0, "a")
    assert [room.begin(number, ONE) for number in range(1, 3)] == [True, False]


def test_a_training_that_waits_holds_back_trials_until_it_has_its_workers() -> None:
    desk = Desk(2)
    room = Room(desk)
    for name in ("a", "b"):
        assert room.begin(name, ONE)
        desk.place(name, ONE)
        room.runs(name, name)
    time.sleep(0.3)  # a look at the cluster is as old as that
    assert room.may_follow()
    with going(room) as trainings:
        trainings.start("t", ONE, 2)
        until(lambda: not room.may_follow())
        for name in ("a", "b"):
            assert trainings.let_in == []
            assert not room.may_follow()
            room.end(name)
            desk.remove(name)
        until(lambda: trainings.let_in == ["t"])
        assert not room.begin("c", ONE)  # Ray has not placed it yet
        desk.place("t", ONE, ONE, training=True)
        until(room.may_follow)
        assert not room.begin("c", ONE)
    desk.remove("t")
    until(lambda: room.begin("c", ONE))


def test_a_training_that_is_started_again_finds_its_workers_although_trials_wait() -> None:
    desk = Desk(4)
    room = Room(desk)
    assert room.begin("a", ONE)
    desk.place("a", ONE)
    room.runs("a", "a")
    with going(room) as trainings:
        trainings.start("t", ONE, 3)
        until(lambda: trainings.let_in == ["t"])
        desk.place("t", ONE, ONE, ONE, training=True)
        time.sleep(0.3)
        assert room.may_follow()
        desk.remove("t")
        time.sleep(1.3)  # its groups were looked at again
        assert not room.begin("b", ONE)
        desk.free = ONE  # a host is lost: nothing is held back for what cannot be
        until(lambda: room.begin("b", ONE))
        desk.place("b", ONE)
        room.runs("b", "b")
        time.sleep(0.3)
        assert room.may_follow()
        desk.free = ONE  # it is back
        until(lambda: not room.may_follow())
        assert not room.begin("c", ONE)
        room.end("b")
        desk.remove("b")
        desk.place("t again", ONE, ONE, ONE, training=True)
        until(room.may_follow)


def test_no_more_trainings_go_on_than_may_and_one_that_waits_for_that_holds_back_no_trial() -> None:
    desk = Desk(4)
    room = Room(desk)
    room.trainings = 1
    with going(room) as trainings:
        trainings.start("t", ONE)
        until(lambda: trainings.let_in == ["t"])
        desk.place("t", ONE, training=True)
        trainings.start("u", ONE)
        time.sleep(0.5)
        assert trainings.let_in == ["t"]
        assert room.begin("a", ONE)
        trainings.end("t")
        desk.remove("t")
        until(lambda: trainings.let_in == ["t", "u"])


def test_no_more_trials_leave_their_seats_than_a_training_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipq_ray.cluster.room._PATIENCE_SECONDS", 1000.0)
    desk = Desk(3)
    room = Room(desk)
    for name in ("a", "b", "c"):
        assert room.begin(name, ONE)
        desk.place(name, ONE)
        room.runs(name, name)
    time.sleep(0.3)
    with going(room) as trainings:
        trainings.start("t", ONE)
        until(lambda: not room.may_follow())
        room.end("a")
        assert room.may_follow()
        desk.remove("a")
        until(lambda: trainings.let_in == ["t"])
        assert room.may_follow()


def test_a_training_that_waits_for_others_than_trials_holds_nothing_back() -> None:
    desk = Desk(3)
    desk.place("of another job", Amount(2))
    room = Room(desk, grows=True)
    with going(room) as trainings:
        trainings.start("t", ONE, 3)
        until(lambda: trainings.let_in == ["t"])  # asked for, and not placed
        assert room.may_follow()


def test_the_first_in_rank_comes_first_and_nobody_overtakes_it() -> None:
    desk = Desk(4)
    room = Room(desk, Amount(2))
    with going(room) as trainings:
        trainings.start("first", ONE, 2)
        until(lambda: trainings.let_in == ["first"])
        desk.place("first", ONE, ONE, training=True)
        trainings.start("low", ONE, 1, rank=1)
        trainings.start("high", ONE, 2, rank=0)
        until(lambda: len(room._queue) == 2)
        trainings.end("first")
        time.sleep(0.5)
        assert trainings.let_in == ["first"]  # what has ended counts until Ray has it back
        desk.remove("first")
        until(lambda: trainings.let_in == ["first", "high"])
        desk.place("high", ONE, ONE, training=True)
        time.sleep(0.5)
        assert trainings.let_in == ["first", "high"]
        trainings.end("high")
        desk.remove("high")
        until(lambda: trainings.let_in == ["first", "high", "low"])


def test_a_limit_counts_what_is_ending_until_it_is_gone_and_a_seat_that_is_taken_over_once() -> None:
    desk = Desk(8)
    room = Room(desk, ONE)
    assert room.begin("a", ONE)
    desk.place("p", ONE)
    room.runs("a", "p")
    room.follow("a", "b")
    room.runs("b", "p")
    assert not room.begin("c", ONE)
    room.end("b")
    time.sleep(0.3)
    assert not room.begin("c", ONE)
    desk.remove("p")
    until(lambda: room.begin("c", ONE))


def test_what_a_training_takes_beside_its_workers_counts_against_the_limit_and_is_not_waited_for() -> None:
    desk = Desk(2)
    room = Room(desk, Amount(4))
    with going(room) as trainings:
        trainings.start("t", ONE, 2, beside=Amount(2))
        until(lambda: trainings.let_in == ["t"])
        desk.place("t", ONE, ONE, training=True)
        time.sleep(0.3)
        desk.free = Amount(6)
        time.sleep(0.3)
        assert not room.begin("trial", ONE)
        trainings.start("other", ONE, 1)
        time.sleep(0.3)
        trainings.end("t")
        desk.remove("t")
        until(lambda: trainings.let_in == ["t", "other"])
        desk.place("other", ONE, training=True)
        until(lambda: room.begin("trial", ONE))


def test_trials_give_way_to_a_training_and_to_what_it_takes_beside_its_workers() -> None:
    desk = Desk(8)
    room = Room(desk, Amount(3))
    for name in ("a", "b"):
        assert room.begin(name, ONE)
        desk.place(name, ONE)
        room.runs(name, name)
    with going(room) as trainings:
        trainings.start("t", ONE, 1, beside=ONE)
        until(lambda: not room.may_follow())
        assert not room.begin("c", ONE)
        assert trainings.let_in == []
        room.end("a")
        desk.remove("a")
        until(lambda: trainings.let_in == ["t"])


def test_shares_of_gpus_add_up() -> None:
    room = Room(Desk(8, 8), Amount(float("inf"), 1))
    assert [room.begin(number, Amount(1, 0.5)) for number in range(3)] == [True, True, False]
    assert UNLIMITED.count(Amount(1, 1)) > 1000
    assert Amount(8, 2).count(Amount(1, 0.25)) == 8


def test_what_waits_ends_with_the_job() -> None:
    room = Room(Desk(1), ONE)
    with ExitStack() as stack:
        stack.enter_context(room.training(ONE, 1, (0,)))
        room.close()
        with pytest.raises(RunError, match="ended while a training waited"), room.training(ONE, 1, (0,)):
            pass
    assert not room.begin(0, ONE)
