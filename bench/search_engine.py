"""`make bench-search`, fourth part: what Ray Tune adds to the evaluations of ResNet-20's search, and what ending evaluations early saves.

"tune": the whole search of the job's defaults (CIFAR-10, the given weights) by the Ray engine, one trial at a time, beside the same search in one
process without Ray: the same points, one thread each. The overhead is Ray's wall time, the start of its actor included, less that of the process,
over the time of the evaluations themselves.

"early": the search at one lambda with evaluations that end once they cannot win, beside the search at that lambda with whole ones: images that were
looked at, and the objective that was reached. The points differ from the first bound on, since the model sees less. One search is one unit; its trials
and its seconds are stored when it ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.record import RESULTS, Row, row, write
from clipq_ray import models, network
from clipq_ray.aim import LADDER
from clipq_ray.cluster.engine import Engine, LocalEngine
from clipq_ray.cluster.on_ray import RayEngine
from clipq_ray.config import make
from clipq_ray.groups import grouped
from clipq_ray.search import Settings, Trial
from clipq_ray.source import Source
from clipq_ray.states import WEIGHTS, write_state
from clipq_ray.storage import Store
from clipq_ray.work import SearchTask, read_trials

UNITS = RESULTS / "search-engine-units"
TRADEOFF = 8.0


def silent(*_: object) -> None:
    """No progress."""


@dataclass(frozen=True)
class Found:
    """One search: its trials by layer and its wall time [s]."""

    trials: Mapping[str, Sequence[Trial]]
    seconds: float

    @property
    def every(self) -> list[Trial]:
        """The trials of all layers."""
        return [trial for points in self.trials.values() for trial in points]

    @property
    def own_seconds(self) -> float:
        """The time of the evaluations themselves."""
        return sum(trial.seconds for trial in self.every)


def searched(
    name: str, engine: Engine, given: argparse.Namespace, tradeoffs: tuple[float, ...], early: bool
) -> Found:
    """The search `name`, made now unless it is stored."""
    source = Source(
        make(model="resnet20", weights=given.weights, data=given.data, validation_images=500, search_parallel=1, device="cpu")
    )  # fmt: skip
    path, config = UNITS / f"{name}.json", source.config
    if not path.exists():
        model = source.network()
        models.apply_weights(model, models.read_weights(given.weights, source.architecture()), given.weights)
        inventory = network.inventory(model, torch.zeros(2, 3, 32, 32), ())
        groups = grouped(model, [layer.name for layer in inventory.layers], ())
        settings = Settings(
            config.search_evaluations, config.search_start, tradeoffs, 0, config.search_stop_gain, config.search_loss_share, early
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            weights = Store(f"{folder}/weights")
            write_state(weights, WEIGHTS, model.state_dict())
            task = SearchTask(
                source, weights.uri, groups, settings, config.search_images, inventory.bytes_before, f"{folder}/trials"
            )  # fmt: skip
            source.data()  # decoded in this process for all of them
            with engine:
                started = time.perf_counter()
                errors: list[Any] = []
                engine.search([task], silent, lambda number, error: errors.append(error))
                seconds = time.perf_counter() - started
            if errors != [None]:
                raise errors[0]
            rows = {
                layer: [trial.to_json() for trial in points] for layer, points in read_trials(task).items()
            }
        UNITS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"seconds": seconds, "trials": rows}) + "\n", encoding="utf-8")
        print(f"{name}: {seconds:.1f} s", flush=True)
    content = json.loads(path.read_text("utf-8"))
    trials = {layer: [Trial(**one) for one in points] for layer, points in content["trials"].items()}
    return Found(trials, content["seconds"])


def tune_rows(rounds: Sequence[tuple[Found, Found]]) -> list[Row]:
    """Ray against one process."""
    for local, on_ray in rounds:
        assert [one.theta for one in local.every] == [one.theta for one in on_ray.every]
    overhead = [100 * (on_ray.seconds - local.seconds) / local.own_seconds for local, on_ray in rounds]
    return [
        row("search_engine/resnet20/tune_overhead", overhead, "% of the evaluations", goal=10.0),
        row("search_engine/resnet20/ray_seconds", [on_ray.seconds for _, on_ray in rounds], "s"),
        row("search_engine/resnet20/process_seconds", [local.seconds for local, _ in rounds], "s"),
        row("search_engine/resnet20/evaluations_seconds", [local.own_seconds for local, _ in rounds], "s"),
        Row("search_engine/resnet20/evaluations", len(rounds[0][0].every), "evaluations"),
    ]  # fmt: skip


def early_rows(whole: Found, early: Found) -> list[Row]:
    """Evaluations that end early against whole ones."""

    def best(points: Sequence[Trial]) -> float:
        return min(trial.objective(TRADEOFF) for trial in points if not trial.bound)

    place = f"search_engine/resnet20/early_lambda{TRADEOFF:g}"
    images = 2000
    behind = [images * (best(early.trials[layer]) - best(points)) for layer, points in whole.trials.items()]
    looked = sum(trial.images for trial in early.every) / sum(trial.images for trial in whole.every)
    return [
        Row(f"{place}/images_over_whole", looked, "ratio", n=len(early.every)),
        Row(f"{place}/bounds", sum(trial.bound for trial in early.every), "evaluations", n=len(early.every)),
        Row(f"{place}/objective_lost", statistics.mean(behind), "images, mean over layers", n=len(behind)),
        Row(f"{place}/objective_lost_most", max(behind), "images", n=len(behind)),
    ]


def main() -> int:
    """All rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder with CIFAR-10")
    parser.add_argument("--weights", required=True, help="ResNet-20's weights")
    parser.add_argument(
        "--rounds", type=int, default=1, help="of Ray beside the process (default: %(default)s)"
    )
    given = parser.parse_args()
    rounds = [
        (searched(f"process-{number}", LocalEngine(), given, LADDER, False), searched(f"ray-{number}", RayEngine(make(search_parallel=1)), given, LADDER, False))
        for number in range(given.rounds)
    ]  # fmt: skip
    whole, early = (
        searched(name, LocalEngine(), given, (TRADEOFF,), name == "early") for name in ("whole", "early")
    )
    print(f"stored in {write('search_engine', [*tune_rows(rounds), *early_rows(whole, early)])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
