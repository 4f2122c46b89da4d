"""What Ray says of a failure, in one line that helps."""

from __future__ import annotations

import pytest

from clipq_ray.cluster.talk import last_line, low_memory

SAID = "4 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: 6ffe) was 12.53GB used / 23.54GB limit (0.532329)"
OF_THE_MONITOR = f"""Training failed due to controller error:
{SAID}
OOM kill reason: Memory usage 13246066688B exceeded threshold of 13244891136B
Ray killed 4 worker(s) based on the killing policy
Refer to the documentation on how to address the out of memory issue: it is long."""


def test_of_low_memory_it_is_which_node_and_how_full_and_not_the_manual() -> None:
    failure = RuntimeError(OF_THE_MONITOR)
    assert low_memory(failure) == last_line(failure) == SAID


@pytest.mark.parametrize(
    ("said", "line"), [("Traceback:\n  here\nValueError: no\n\n", "ValueError: no"), ("", "RuntimeError")]
)
def test_of_others_it_is_the_last_line(said: str, line: str) -> None:
    assert low_memory(RuntimeError(said)) is None
    assert last_line(RuntimeError(said)) == line
