"""The bench of the packed file measures when it is asked to, and only then."""

from __future__ import annotations

import sys

import pytest

from bench import packed_file


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--dry-run", 2), ("resnet20", 2)])
def test_an_argument_measures_and_replaces_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str, code: int
) -> None:
    for name in ("sizes", "resnet50", "loading", "write"):
        monkeypatch.setattr(packed_file, name, lambda *given: pytest.fail("it measured"))
    monkeypatch.setattr(sys, "argv", ["packed_file.py", argument])
    with pytest.raises(SystemExit) as ended:
        packed_file.main()
    assert ended.value.code == code
    assert "usage: packed_file.py" in "".join(capsys.readouterr())
