"""The README is true: its files exist, its snippets run, its record scores what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from clipq_ray import cli, options

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_place_on_the_map_exists() -> None:
    for name in re.findall(r"^\| `([^`]+)` \|", README, flags=re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_the_python_snippet_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_the_command_of_the_record_is_a_valid_configuration() -> None:
    (command,) = re.findall(
        r"python jobs/compress\.py (--model.*?--search-evaluations \d+)", README, flags=re.DOTALL
    )
    assert options.parse_all(command.replace("\\\n", " ").split(), "").configs[0].epochs == 10


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make (\w[\w-]*)", README):
        assert target in ("on",) or re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.slow
def test_the_record_scores_what_the_readme_says(shared: Path) -> None:
    command = [
        sys.executable,
        "jobs/evaluate.py",
        "bench/records/resnet20-cifar10.clq",
        "--data",
        str(shared / "data" / "cifar10"),
    ]
    printed = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    ).stdout
    assert "57,336" in printed
    assert "91.20 %" in printed


def test_the_commands_on_a_file_run(tmp_path: Path) -> None:
    commands = re.findall(r"`clipq (\w+) ([^`]+)`", README)
    assert [name for name, _ in commands] == ["inspect", "verify", "prune", "export"]
    file, out = str(ROOT / "bench" / "records" / "resnet20-cifar10.clq"), str(tmp_path / "out.safetensors")
    for name, arguments in commands:
        uri = str(tmp_path) if name == "prune" else file
        (tmp_path / "_stages" / "search-0").mkdir(parents=True, exist_ok=True)
        (tmp_path / "_stages" / "search-0" / "done.json").write_text("{}")
        words = arguments.replace("FILE", file).replace("URI", uri).replace("OUT.safetensors", out).split()
        assert cli.main([name, *words]) == 0
    assert Path(out).stat().st_size > 1_000_000
