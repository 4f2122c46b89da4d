"""Numbers are written with units, and what is not there is said."""

from __future__ import annotations

import pytest

from clipq_ray.report import words


def plain(text: str) -> str:
    return text.replace(words.SPACE, " ").replace(words.MINUS, "-")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 KB"), (1085992, "1.09 MB"), (53613, "53.6 KB"), (999_499, "999 KB"), (999_999, "1.00 MB"), (102_000_000, "102 MB"), (5e12, "5,000 GB"), (None, "not measured")],
)  # fmt: skip
def test_bytes_have_three_figures_and_powers_of_1000(value: float | None, text: str) -> None:
    assert plain(words.size(value)) == text


@pytest.mark.parametrize(("value", "text"), [(0.0, "0.00 %"), (-0.001, "0.00 %"), (-1.5, "-1.50 %"), (None, "not measured"), (float("nan"), "not measured")])  # fmt: skip
def test_percentages(value: float | None, text: str) -> None:
    assert plain(words.percent(value)) == text


def test_signs_stand_only_on_what_is_not_zero_after_rounding() -> None:
    assert [plain(words.signed(value, 1)) for value in (0.04, -0.04, 0.06, -2.0)] == [
        "0.0",
        "0.0",
        "+0.1",
        "-2.0",
    ]


def test_an_interval_needs_both_ends() -> None:
    assert plain(words.interval(1, 2)) == "1.00 to 2.00 %"
    assert words.interval(None, 2) == words.NONE


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (59.9, "59.9 s"), (59.97, "1 min 00 s"), (3599.6, "1 h 00 min"), (4325, "1 h 12 min"), (None, "not measured")])  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert plain(words.duration(seconds)) == text


def test_names_lose_control_characters_and_their_middle() -> None:
    assert words.printable("a\nb\x00c\u202e") == "a�b�c�"
    assert words.printable("abcdefghij", 5) == "ab…ij"
    assert words.printable("abcde", 5) == "abcde"


def test_nested_values_become_dotted_rows() -> None:
    value = {
        "a": {"b": 1, "c": [1, 2]},
        "d": [],
        "e": None,
        "f": [{"g": True}],
        "h": {},
        "i": list(range(30)),
    }
    rows = dict(words.flat(value))
    assert rows.pop("i").endswith("19, … (30 in all)")
    assert rows == {"a.b": "1", "a.c": "1, 2", "d": "none", "e": "none", "f[0].g": "yes", "h": "none"}
