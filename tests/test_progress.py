"""A person sees at any time what runs, how far it is and how long it will take: bars on a terminal, lines in a log."""

from __future__ import annotations

import io
import time

import pytest

from clipq_ray import console, progress
from clipq_ray.progress import Reporter


class Clock:
    """A clock that a test sets by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_a_log_gets_stage_layer_share_and_time_left(clock: Clock) -> None:
    stream = io.StringIO()
    with Reporter(stream).stage("search") as stage:
        stage(0, 100, "conv1.weight")
        clock.now += 60
        stage(25, 100, "conv2.weight")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[0:00] search: conv1.weight, 0 of 100 steps (0 %)"
    assert lines[1] == "[1:00] search: conv2.weight, 25 of 100 steps (25 %), about 3:00 left"
    assert lines[2] == "[1:00] search: done in 1:00"


def test_a_log_gets_at_most_a_line_every_ten_seconds(clock: Clock) -> None:
    stream = io.StringIO()
    with Reporter(stream).stage("finetune") as stage:
        for step in range(200):
            stage(step, 200, "epoch 1 of 1")
            clock.now += 0.5
    assert len(stream.getvalue().splitlines()) == 10 + 1


def test_what_was_done_before_a_restart_does_not_count_for_the_time_left(clock: Clock) -> None:
    stream = io.StringIO()
    with Reporter(stream).stage("finetune") as stage:
        stage(50, 100, "epoch 6 of 10")
        clock.now += 20
        stage(60, 100, "epoch 7 of 10")
    assert "about 1:20 left" in stream.getvalue()


def test_hours_are_shown_as_hours(clock: Clock) -> None:
    stream = io.StringIO()
    reporter = Reporter(stream)
    clock.now += 3 * 3600 + 65
    reporter.say("still here")
    assert stream.getvalue() == "[3:01:05] still here\n"


def test_a_terminal_gets_a_bar_with_the_words_from_the_first_step_on() -> None:
    stream = Terminal()
    with Reporter(stream).stage("finetune") as stage:
        stage(1, 10, "epoch 1 of 2")
        assert "1/10" in stream.getvalue()
        assert "epoch 1 of 2" in stream.getvalue()
        time.sleep(0.15)  # tqdm draws at most ten times a second
        stage(10, 10, "epoch 2 of 2")
    assert "10/10" in stream.getvalue()
    assert "epoch 2 of 2" in stream.getvalue()


def test_quiet_writes_nothing() -> None:
    for stream in (io.StringIO(), Terminal()):
        reporter = Reporter(stream, quiet=True)
        reporter.say("hello")
        with reporter.stage("search") as stage:
            stage(1, 2, "layer")
        assert stream.getvalue() == ""


def test_a_stage_that_fails_is_not_said_to_be_done() -> None:
    stream = io.StringIO()

    def fail() -> None:
        with Reporter(stream).stage("search") as stage:
            stage(1, 2, "layer")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert "done" not in stream.getvalue()


def test_what_would_steer_a_terminal_is_spelt_out(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    Reporter(stream).about("a\x1b[2J").say("data: \x1b]0;owned\x07.txt is not used")
    assert "\x1b" not in stream.getvalue()
    assert r"a\x1b[2J: data: \x1b]0;owned\x07.txt is not used" in stream.getvalue()
    console.show("a\x1b[2J\nb", "c")
    assert capsys.readouterr().out == "a\\x1b[2J\\nb\nc\n"
