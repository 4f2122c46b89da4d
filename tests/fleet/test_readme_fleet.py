"""The fleet file of the README is one that is read as it stands."""

from __future__ import annotations

import re
from pathlib import Path

from clipq_ray.fleet.file import Ensemble, read

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_readmes_fleet_is_read(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (ensembles,) = re.findall(r"`(ensembles: .*?\])`", README)
    path = tmp_path / "night.yaml"
    path.write_text(f"{text}{ensembles}\n")
    fleet = read(str(path), {})
    assert [config.result_name for config in fleet.configs] == ["resnet50", "small50", "mobilenet_v2"]
    assert [config.max_drop for config in fleet.configs] == [None, None, 0.5]
    assert (fleet.configs[0].trainings, fleet.configs[0].limit_gpus) == (2, 8)
    assert fleet.priorities == (5, 0, 0)
    assert fleet.ensembles == (Ensemble("vote", ("resnet50", "small50")),)
    path.write_text(
        path.read_text()
        .replace("members:", "target_bytes: 9000000, members:")
        .replace(", target_ratio: 25", "")
    )
    assert read(str(path), {}).ensembles[0].wants == ("target_bytes", 9_000_000)
