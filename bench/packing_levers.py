"""`python bench/packing_levers.py RUN...`: what each lever of packing is worth alone: the weights of a committed run's last round, packed as the run was and
without one lever at a time: `without-folding` keeps batch norms as the four vectors that they are, other vectors on grids; `without-vectors` (--vectors exact) has no grids either.

The same weights, plan and images every time, so bytes differ by the lever alone; top-1 is of the decoded file on validation images. RUN is a folder
`model=NAME/run=ID` whose stages still lie beside it, made with --hold-size (which stores the plan). What is trained behind the round (levels) is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.record import Row, positive, row, write
from clipq_ray import console, folding, manifest, network, packing
from clipq_ray.config import make
from clipq_ray.consistency import PAPER
from clipq_ray.errors import ConfigError
from clipq_ray.plan import Plan
from clipq_ray.source import Source
from clipq_ray.storage import Store, stage_store
from clipq_ray.training import plan_after
from clipq_ray.work import prepare_process

LEVERS: Mapping[str, Mapping[str, Any]] = {
    "as-made": {},
    **{
        f"without-{name.replace('_', '-')}": {name: PAPER[name]}
        for name in ("unit_order", "dead_units", "vectors")
    },
    "without-folding": {},
    "fast-profile": {"profile": "fast"},
}


@dataclass(frozen=True)
class Round:
    """The last round of a committed run: full-precision weights in `tuned`, and the plan that it ended with."""

    name: str
    source: Source
    tuned: Store
    plan: Plan
    source_sha256: str

    @classmethod
    def of(cls, run: Path, given: Mapping[str, Any]) -> Round:
        """That of the run in a folder, with other options `given`; `ConfigError` where nothing says what its plan was."""
        document = manifest.read_manifest(Store(run))
        trained = [one for one in document["stages"] if one["stage"] == "finetune"]
        tuned = stage_store(
            Store(run.parents[1]), "finetune", trained[document["promise"]["round"] - 1]["key"]
        )
        plan, _ = plan_after(tuned, Plan(()))
        if not plan.layers:
            raise ConfigError(
                f"{run}: expected a run with --hold-size, whose plan is stored, got one without; name another"
            )
        source = Source(make(**{**document["config"], "engine": "local", **given}))
        return cls(document["model"], source, tuned, plan, document["source_sha256"])

    def packed(self, options: Mapping[str, Any]) -> packing.PackedNetwork:
        """Its file with other options of packing."""
        source = replace(self.source, config=self.source.config.model_copy(update=dict(options)))
        data = source.data()
        images = data.train.batch(torch.arange(2), None)[0]
        inventory = network.inventory(source.network(), images, source.config.keep)
        return packing.pack(source, self.tuned, self.plan, inventory, data, self.source_sha256)


def measured(last: Round) -> Iterator[Row]:
    """Bytes and validation top-1 with each lever left out."""
    for lever, options in LEVERS.items():
        apart = (
            patch.object(folding, "_folded", lambda *_: None) if lever == "without-folding" else nullcontext()
        )
        with apart:
            found = last.packed(options)
        place = f"packing_levers/{last.name}/{lever}"
        yield row(f"{place}/bytes", [float(len(found.file))], "bytes")
        yield row(f"{place}/validation_top1", [round(100 * found.validation.top1, 3)], "%")
        yield row(f"{place}/dead_units", [float(found.dead_units)], "units")


def main(words: list[str]) -> int:
    """The rows of all runs."""
    parser = console.OneLineParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--data", help="where the data lie by now; default: where they lay")
    parser.add_argument("--threads", type=positive, default=1)
    given = parser.parse_args(words)
    prepare_process(given.threads)
    moved = {"data": given.data} if given.data else {}
    rows = [one for run in given.runs for one in measured(Round.of(run.resolve(), moved))]
    print(f"stored in {write('packing_levers', rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(console.run("packing_levers", main))
