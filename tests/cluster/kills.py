"""A job on a three-node cluster of this machine, what is killed of it at random moments, and what the kills did.

The chaos test and `make bench-chaos` share it. The cluster is a head without CPUs, on which the driver runs, and three nodes of one CPU each,
started by this process, so that everything is found through it and nothing else is touched. A stage is known from the job's own lines. Not covered:
the head itself, whose loss ends a Ray cluster.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from job_process import LIMIT_SECONDS, Job, Process, children, command, end
from ray.cluster_utils import Cluster

from clipq_ray import manifest, tables
from clipq_ray.checkpoints import Checkpoints
from clipq_ray.errors import StorageError
from clipq_ray.storage import LAYERS, MODEL, TRIALS, Store

TRAININGS = ("baseline", "control", "finetune")
STAGES = ("prepare", "baseline", "search", "control", "finetune", "pack", "verify", "commit")
PAIRS = (
    *(("training worker", stage) for stage in TRAININGS),
    ("search actor", "search"),
    *(("raylet", stage) for stage in ("baseline", "search", "control", "finetune")),
    *(("driver", stage) for stage in STAGES),
)
"""What can be killed when: of the other pairs there is nothing to hit, since that kind of process does nothing in that stage."""

EPOCHS, EVALUATIONS, GROUPS = 10, 16, 5
OPTIONS: dict[str, Any] = {
    "weights": "train", "baseline_epochs": EPOCHS, "epochs": EPOCHS, "control": "always", "search_evaluations": EVALUATIONS,
    "search_stop_gain": 0, "search_images": 200, "max_failures": 20,
}  # fmt: skip
WORKERS = {**dict.fromkeys(TRAININGS, "training worker"), "search": "search actor"}
"""What works in a stage."""
_TITLES = {"training worker": "RayTrainWorker", "search actor": "ResourceTrainable"}
_BEGUN = (
    ("baseline", r"data: (?!opening)"),
    ("search", r"baseline: top-1"),
    ("control", r"search: (done|already)"),
    ("finetune", r"round 1: lambda"),
    ("pack", r"finetune: (done|already)"),
    ("verify", r"pack round 1: done"),
    ("commit", r"verify: done"),
)
_NICENESS = "RAY_worker_niceness"
_POLL_SECONDS = 0.02
_SECONDS_PER_KILL = LIMIT_SECONDS / 4  # for the job to go on, on a machine that does other things too


def submission(storage: Path, **changes: Any) -> list[str]:
    """The job: LeNet-5 on the digits by two workers, trained first and with a dense control unless `changes` say otherwise."""
    return command(storage, **{**OPTIONS, **changes})


# -- the cluster -------------------------------------------------------------------------------------------------------------
class Nodes:
    """The cluster; a node that is lost comes back when it is told to."""

    def __init__(self, count: int = 3) -> None:
        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self._nodes: list[Any] = []
        for _ in range(count):
            self.add()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> None:
        """One more node; from the main thread only."""
        self._nodes.append(self._cluster.add_node(num_cpus=1))

    def raylets(self) -> list[int]:
        return [node.all_processes["raylet"][0].process.pid for node in self._nodes]

    def working(self, kind: str, raylet: int | None = None) -> list[Process]:
        """The processes of one kind on all nodes, or on one."""
        raylets = self.raylets() if raylet is None else [raylet]
        return [one for one in children(raylets) if _TITLES[kind] in one.title]

    def lose(self, raylet: int) -> None:
        """End a node with all its processes at once, as if it had lost power."""
        (node,) = [node for node in self._nodes if node.all_processes["raylet"][0].process.pid == raylet]
        inside = children([raylet])
        for pid in (raylet, *(one.pid for one in inside)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


@contextmanager
def three_nodes() -> Iterator[Nodes]:
    """The cluster; its processes run as fast as others, since all that runs here waits for them."""
    before = os.environ.get(_NICENESS)
    os.environ[_NICENESS] = "0"
    try:
        nodes = Nodes()
    finally:
        if before is None:
            del os.environ[_NICENESS]
        else:
            os.environ[_NICENESS] = before
    try:
        yield nodes
    finally:
        nodes.close()


# -- what lies in the storage ------------------------------------------------------------------------------------------------
Rows = dict[str, list[dict[str, Any]]]


def rows_so_far(storage: Path) -> Rows:
    """What is stored of a job by now, finished or not: epochs by training, evaluations by layer, each with its seconds, which tell whether it was
    made once."""
    found: Rows = {}
    for path in storage.glob("_stages/search-*/*-*.json"):
        with suppress(FileNotFoundError):  # a partial one whose layer has just ended
            rows = json.loads(path.read_text())
            if rows and len(rows) > len(found.get(rows[0]["layer"], [])):
                found[rows[0]["layer"]] = rows
    for stage in TRAININGS:
        for path in storage.glob(f"_stages/{stage}-*/curve.json"):
            found[stage] = json.loads(path.read_text())["curve"]
        for place in storage.glob(f"model=*/run=*/_work/{stage}/*"):
            with suppress(StorageError):  # removed while it was read
                last = Checkpoints(Store(place)).latest()
                if last is not None and stage not in found:
                    found[stage] = last[1]["curve"]
    return found


def _done(rows: Rows, stage: str) -> int:
    """How far a stage is: epochs, or evaluations."""
    if stage == "search":
        return sum(len(one) for name, one in rows.items() if name not in TRAININGS)
    return len(rows.get(stage, []))


def _finished(storage: Path, stage: str) -> bool:
    last = "done.json" if stage == "search" else "curve.json"
    return bool(list(storage.glob(f"_stages/{stage}-*/{last}")))


def redone(before: Rows, after: Rows) -> int:
    """How many epochs and evaluations were stored `before` and made again all the same."""
    return sum(
        row != again for name, rows in before.items() for row, again in zip(rows, after[name], strict=False)
    )


def artifact(storage: Path) -> dict[str, str]:
    """SHA-256 of what must not differ: the file, the table of layers with the plan, and the search's points and values."""
    (run,) = manifest.committed(Store(storage))
    files = manifest.read_manifest(run.store)["files"]
    trials = tables.from_bytes(run.store.read(TRIALS)).drop_columns(["seconds", "node"]).to_pylist()
    told = hashlib.sha256(json.dumps(trials).encode()).hexdigest()
    return {name: files[name]["sha256"] for name in (MODEL, LAYERS)} | {"trials": told}


def left_over(storage: Path) -> list[str]:
    """What should not be there once a job has ended: damage, checkpoints, claims, what is unfinished."""
    (run,) = manifest.committed(Store(storage))
    problems = manifest.verify(run.store)
    inside = Store(storage).names()
    unfinished = re.compile(r"/_work/|/_making/|/claim-|/partial-|/error\.json")
    return problems + [name for name in inside if unfinished.search("/" + name)]


# -- kills -------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Order:
    """What is to be killed: so many epochs or evaluations into a stage, and so many seconds."""

    kind: str
    stage: str
    after: int
    delay_seconds: float


@dataclass
class Kill:
    """One kill that hit something. `done`: epochs or evaluations of the stage that were stored; `redone`: of all that was stored, made again;
    `before`: what was stored; `others`: the processes that did the same work."""

    time: float
    kind: str
    stage: str
    pid: int
    hit: list[str]
    done: int
    recovered_seconds: float | None = None
    redone: int | None = None
    before: Rows = field(default_factory=dict, repr=False)
    others: frozenset[int] = frozenset()

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("before", "others")}


def orders(pairs: Iterable[tuple[str, str]], seed: int, usual: Mapping[str, float]) -> list[Order]:
    """Random moments for kills of these kinds in these stages, in the order of the job; `usual`: seconds of every stage undisturbed."""
    chance = random.Random(seed)
    drawn: list[Order] = []
    for kind, stage in pairs:
        if stage == "search":
            after = chance.randrange(1, GROUPS * EVALUATIONS // 3)
        else:
            after = chance.randrange(EPOCHS - 2) if stage in TRAININGS else 0
        # early ones more often: a driver that goes on behind a kill is through with these stages sooner than an undisturbed one
        delay = chance.uniform(0, 0.5) if stage in WORKERS else 0.9 * usual[stage] * chance.random() ** 3
        drawn.append(Order(kind, stage, after, delay))
    return sorted(drawn, key=lambda one: (STAGES.index(one.stage), one.after))


class Ended(NamedTuple):
    """What became of a job: kills that hit, orders that came too late, seconds of every stage as the harness saw them."""

    kills: list[Kill]
    missed: list[Order]
    stages: dict[str, float]


class _Run:
    """One job, submitted again whenever its driver is killed."""

    def __init__(
        self, nodes: Nodes, storage: Path, logs: Path, given: Sequence[Order], seed: int, changes: Mapping[str, Any]
    ) -> None:  # fmt: skip
        self.nodes, self.storage, self.logs, self.changes = nodes, storage, logs, changes
        self.pending, self.chance = list(given), random.Random(seed)
        self.kills: list[Kill] = []
        self.missed: list[Order] = []
        self.begun: dict[str, float] = {}
        self.back: list[float] = []
        self.submissions = 0
        self.ready_at: float | None = None
        self.job = self.submit()

    def submit(self) -> Job:
        self.submissions += 1
        self.log = self.logs / f"submission-{self.submissions}"
        self.begun = {}
        return Job(submission(self.storage, **self.changes), self.log, {"RAY_ADDRESS": self.nodes.address})

    def stage(self) -> str:
        text = self.log.read_text()
        now = "prepare"
        for stage, line in _BEGUN:
            if not re.search(line, text):
                break
            now = stage
        self.begun.setdefault(now, time.monotonic())
        return now

    def play(self) -> Ended:
        limit = time.monotonic() + 2 * LIMIT_SECONDS + _SECONDS_PER_KILL * len(self.pending)
        while self.job.process.poll() is None:
            assert time.monotonic() < limit, f"it took too long: {self.log.read_text()[-2000:]}"
            self.restore()
            self.look(self.stage())
            brief = self.pending and self.pending[0].stage not in WORKERS
            time.sleep(_POLL_SECONDS / 10 if brief else _POLL_SECONDS)
        code = self.job.process.returncode
        assert code == 0, f"exit code {code}: {self.log.read_text()[-3000:]}"
        self.missed += self.pending
        after = rows_so_far(self.storage)
        for kill in self.kills:
            kill.redone = redone(kill.before, after)
        times = [*self.begun.values(), time.monotonic()]
        stages = {
            name: till - since for (name, since), till in zip(self.begun.items(), times[1:], strict=True)
        }
        return Ended(self.kills, self.missed, stages)

    def restore(self) -> None:
        """Bring back nodes that were lost for long enough."""
        while self.back and time.monotonic() > self.back[0]:
            self.back.pop(0)
            self.nodes.add()

    def look(self, stage: str) -> None:
        """Kill what is due."""
        while self.pending and STAGES.index(self.pending[0].stage) < STAGES.index(stage):
            self.missed.append(self.pending.pop(0))
            self.ready_at = None
        if self.kills and self.kills[-1].recovered_seconds is None:
            if not self.recovered(self.kills[-1], stage):
                return  # the next one waits until the job goes on
            self.kills[-1].recovered_seconds = round(time.time() - self.kills[-1].time, 2)
        if not self.pending or self.pending[0].stage != stage:
            return
        order = self.pending[0]
        if self.ready_at is None:
            if stage in WORKERS and _done(rows_so_far(self.storage), stage) < order.after:
                return
            self.ready_at = time.monotonic() + order.delay_seconds
        if time.monotonic() >= self.ready_at and self.kill(order):
            self.ready_at = None

    def recovered(self, last: Kill, stage: str) -> bool:
        """Whether the job has gone on since the last kill: behind its stage, or in it by other processes."""
        if STAGES.index(stage) > STAGES.index(last.stage):
            return True
        if stage != last.stage:
            return False
        if stage not in WORKERS:
            return True
        working = {one.pid for one in self.nodes.working(WORKERS[stage])}
        others = working - last.others if stage == "search" else working and not working & last.others
        return bool(others) and _done(rows_so_far(self.storage), stage) > last.done

    def kill(self, order: Order) -> bool:
        """Whether there was something to kill."""
        brief = order.stage not in WORKERS  # may be over before all that is stored is read
        before = {} if brief else rows_so_far(self.storage)
        victim = self.victim(order)
        if victim is None:
            return False
        pid, hit = victim
        others = self.nodes.working(WORKERS[order.stage]) if order.stage in WORKERS else []
        kill = Kill(
            time.time(), order.kind, order.stage, pid, hit, _done(before, order.stage), before=before,
            others=frozenset(one.pid for one in others),
        )  # fmt: skip
        if order.kind == "raylet":
            self.nodes.lose(pid)
            self.back.append(time.monotonic() + self.chance.uniform(1, 4))
        else:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if order.kind == "driver":
            self.job.process.wait()
        if brief:
            kill.before = rows_so_far(self.storage)
        self.pending.pop(0)
        if self.hit(order, len(others)):
            self.kills.append(kill)
        else:
            self.missed.append(order)
        if order.kind == "driver":
            end(self.job.session)
            self.job = self.submit()
        return True

    def victim(self, order: Order) -> tuple[int, list[str]] | None:
        """A process to kill and what it does; None while there is none, or none that works."""
        if order.kind == "driver":
            return self.job.process.pid, [f"the driver in {order.stage}"]
        kind = WORKERS[order.stage]
        working = self.nodes.working(kind)
        if not working:
            return None
        if order.kind != "raylet":
            chosen = self.chance.choice(sorted(working))
            return chosen.pid, [chosen.title]
        busy = [raylet for raylet in self.nodes.raylets() if self.nodes.working(kind, raylet)]
        raylet = self.chance.choice(busy)
        return raylet, [one.title for one in self.nodes.working(kind, raylet)]

    def hit(self, order: Order, working: int) -> bool:
        """Whether what was killed was still needed; so many processes were `working`."""
        if order.kind == "driver":
            committed = list(self.storage.glob("model=*/run=*/manifest.json"))
            return self.stage() == order.stage and not committed
        if order.stage != "search":
            return not _finished(self.storage, order.stage)
        ended = len(list(self.storage.glob("_stages/search-*/group-*.json")))
        return GROUPS - ended >= working  # no actor was there for nothing


def disturbed(
    nodes: Nodes, storage: Path, logs: Path, given: Sequence[Order] = (), seed: int = 0, **changes: Any
) -> Ended:
    """Run a job to its end while what `given` says is killed; a driver that was killed is submitted again. `changes`: of its options."""
    logs.mkdir(parents=True, exist_ok=True)
    run = _Run(nodes, storage, logs, given, seed, changes)
    try:
        return run.play()
    finally:
        end(run.job.session)
        run.job.process.wait()
        for _ in run.back:
            nodes.add()
