"""`make bench-search`, fourth part: the searched (p, b) of every layer against one (p, b) for all, at the same file size after equal fine-tuning.

ResNet-20 on CIFAR-10 from the given weights. Searched: the product's own search, its choice for `--bytes`. Global: for every b, the mildest p (in steps of
0.001) whose file is predicted to take at most one hundredth more than the searched one took: files grow by a hundredth or so while they are trained, and what
is left of the difference is in the rows. Of the bit widths the one that does best on the test set counts, which is in its favour. All are fine-tuned by the
product's own loop (same data, batches, epochs, schedule) and packed; top-1 of the decoded files on the test set. One point and seed is one unit: its JSON is
stored when it ends and is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.record import RESULTS, Row, row, write
from clipq_ray import codec, loading, models, network, packing, search
from clipq_ray.aim import LADDER
from clipq_ray.choice import choose_for_bytes
from clipq_ray.cluster.engine import LocalEngine
from clipq_ray.config import Config, make
from clipq_ray.evaluate import evaluate
from clipq_ray.groups import grouped
from clipq_ray.operator import make_plan
from clipq_ray.plan import Theta
from clipq_ray.quantizer import decide_share, quantize
from clipq_ray.source import Source
from clipq_ray.stages import schedule_of
from clipq_ray.states import WEIGHTS, read_state, write_state
from clipq_ray.storage import Store
from clipq_ray.training import TrainTask
from clipq_ray.work import SearchTask, layer_bytes, read_trials


def silent(*_: Any) -> None:
    """No progress."""


def configuration(given: argparse.Namespace, seed: int) -> Config:
    """What the job would have."""
    return make(
        model="resnet20", weights=given.weights, data=given.data, engine="local", seed=seed, epochs=given.epochs,
        learning_rate=given.learning_rate, precision="auto", search_evaluations=given.evaluations, validation_images=2500,
    )  # fmt: skip


class Bench:
    """One seed: network, data, and a folder for stores."""

    def __init__(self, given: argparse.Namespace, seed: int, folder: Path) -> None:
        self.given, self.seed, self.folder = given, seed, folder
        self.source = Source(configuration(given, seed))
        architecture = self.source.architecture()
        self.model = self.source.network()
        models.apply_weights(self.model, models.read_weights(given.weights, architecture), given.weights)
        self.initial = Store(folder / "initial")
        write_state(self.initial, WEIGHTS, self.model.state_dict())
        self.inventory = network.inventory(self.model, torch.zeros(2, 3, 32, 32), ())
        self.layers = [layer.name for layer in self.inventory.layers]
        self.other = packing.other_bytes(self.source, self.model, self.inventory, self.source.data())

    def searched(self) -> dict[str, Theta]:
        """The choice of the search for so many bytes; a search is a unit as well."""
        config = self.source.config
        output = RESULTS / "search-global-units" / f"search-e{self.given.evaluations}-seed{self.seed}"
        groups = grouped(self.model, self.layers, ())
        settings = search.Settings(
            config.search_evaluations, config.search_start, LADDER, self.seed, config.search_stop_gain, config.search_loss_share
        )  # fmt: skip
        task = SearchTask(
            self.source, self.initial.uri, groups, settings, config.search_images, self.inventory.bytes_before, Store(output).uri
        )  # fmt: skip
        errors: list[Any] = []
        LocalEngine().search([task], silent, lambda number, error: errors.append(error))
        if errors != [None]:
            raise errors[0]
        return choose_for_bytes(read_trials(task), self.given.bytes - self.other).thetas(groups)

    def bytes_of(self, thetas: dict[str, Theta]) -> int:
        """Of the layers, before training."""
        total = 0
        for name, theta in thetas.items():
            weight = self.model.get_parameter(name).detach()
            share = decide_share(weight, theta)
            total += layer_bytes(self.source.config, codec.coded(quantize(weight, theta, share), share))
        return total

    def one_for_all(self, b: int, budget: float) -> dict[str, Theta]:
        """The mildest p, in steps of 0.001, with which all layers take at most `budget` bytes at bit width `b`."""
        low, high = 0, 999
        while low < high:
            middle = (low + high) // 2
            if self.bytes_of(dict.fromkeys(self.layers, Theta(middle / 1000, b))) > budget:
                low = middle + 1
            else:
                high = middle
        return dict.fromkeys(self.layers, Theta(low / 1000, b))

    def unit(self, thetas: dict[str, Theta], variant: str) -> dict[str, Any]:
        """Fine-tune, pack, and score the decoded file."""
        started = time.time()
        config = self.source.config
        plan = make_plan(self.model, thetas)
        tuned = Store(self.folder / variant)
        schedule = schedule_of(config, config.epochs, config.learning_rate)
        checkpoints = Store(self.folder / f"{variant}-checkpoints")
        task = TrainTask(
            self.source, "finetune", self.initial.uri, plan, schedule, tuned.uri, checkpoints.uri
        )
        LocalEngine().train(
            task, lambda done, total, words: print(f"  {words}", flush=True) if done == total else None
        )
        sha256 = models.weights_sha256(read_state(self.initial))
        packed = packing.pack(self.source, tuned, plan, self.inventory, self.source.data(), sha256)
        decoded = loading.from_bytes(packed.file, factory=self.source.network)
        test = self.source.data().test
        assert test is not None
        result = evaluate(decoded, test, batch_size=250)
        return {
            "variant": variant, "seed": self.seed, "bytes": len(packed.file), "predicted_bytes": self.bytes_of(thetas) + self.other,
            "test_top1_percent": 100 * result.top1, "validation_top1_percent": 100 * packed.validation.top1,
            "thetas": {name: [theta.p, theta.b] for name, theta in thetas.items()}, "epochs": config.epochs, "seconds": time.time() - started,
        }  # fmt: skip


class Units:
    """What was measured, by name; what is missing is measured when it is asked for."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self._bench = given, dict[int, Bench]()
        self._folder = RESULTS / "search-global-units"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._place = tempfile.TemporaryDirectory()

    def _named(self, name: str, seed: int, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self._folder / f"{self.given.bytes}-{name}-e{self.given.epochs}-seed{seed}.json"
        if not path.exists():
            print(f"{name}, seed {seed}", flush=True)
            path.write_text(json.dumps(make()) + "\n", encoding="utf-8")
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return found

    def bench(self, seed: int) -> Bench:
        """The network and data of a seed."""
        if seed not in self._bench:
            self._bench[seed] = Bench(self.given, seed, Path(self._place.name) / str(seed))
        return self._bench[seed]

    def searched(self, seed: int) -> dict[str, Any]:
        """The search's choice, fine-tuned."""

        def make() -> dict[str, Any]:
            bench = self.bench(seed)
            return bench.unit(bench.searched(), "searched")

        return self._named("searched", seed, make)

    def one_for_all(self, b: int, seed: int) -> dict[str, Any]:
        """One (p, b), fine-tuned, of a hundredth more bytes than the searched file of the seed."""

        def make() -> dict[str, Any]:
            bench = self.bench(seed)
            thetas = bench.one_for_all(b, 1.01 * self.searched(seed)["bytes"] - bench.other)
            return bench.unit(thetas, f"global-b{b}")

        return self._named(f"global-b{b}", seed, make)


def main() -> int:
    """The table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder with CIFAR-10")
    parser.add_argument("--weights", required=True, help="ResNet-20's weights")
    parser.add_argument("--bytes", type=int, default=30_000, help="of the file")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--evaluations", type=int, default=18)
    parser.add_argument(
        "--bits", type=int, nargs="+", default=[2, 3], help="bit widths of the global setting"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    given = parser.parse_args()
    units = Units(given)
    searched = [units.searched(seed) for seed in range(given.seeds)]
    others = {b: [units.one_for_all(b, seed) for seed in range(given.seeds)] for b in given.bits}
    place = f"search_global/resnet20-cifar10/{given.bytes}bytes-{given.epochs}epochs"
    rows: list[Row] = []
    for name, runs in {
        "searched": searched,
        **{f"global/b{b}": found for b, found in others.items()},
    }.items():
        predicted = [run["bytes"] / run["predicted_bytes"] for run in runs]
        rows.append(row(f"{place}/{name}/test_top1", [run["test_top1_percent"] for run in runs], "%"))
        rows.append(row(f"{place}/{name}/bytes", [float(run["bytes"]) for run in runs], "bytes"))
        rows.append(row(f"{place}/{name}/bytes_over_predicted", predicted, "", goal=1.05))
    best = [
        max(runs, key=lambda run: float(run["test_top1_percent"]))
        for runs in zip(*others.values(), strict=True)
    ]
    pairs = list(zip(searched, best, strict=True))
    gains = [mine["test_top1_percent"] - other["test_top1_percent"] for mine, other in pairs]
    sizes = [other["bytes"] / mine["bytes"] for mine, other in pairs]
    rows.append(row(f"{place}/searched_minus_global", gains, "points", goal=0.0, better="higher"))
    rows.append(row(f"{place}/global_bytes_over_searched", sizes, ""))
    print(f"stored in {write('search_global', rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
