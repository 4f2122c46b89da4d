"""The Ray engine: the search as trials of Ray Tune, trainings on Ray Train.

Training: one TorchTrainer (Train V2, DDP; NCCL on GPUs, gloo on CPUs), restarted from the last checkpoint in the store when a worker or a node is
lost, and another one where Ray gives it up and `failures` does not. The search is `ray_search`.

Without a running cluster, Ray starts on this machine and ends with the job; its logs are kept where something failed. Ray's own storage is a temporary folder of the
job, on a cluster `_work` of the run for trainings; nothing that must last lies there, since Tune pickles. Not covered: several searches at a time on one cluster; the
next job's waits.
"""

from __future__ import annotations

import logging
import math
import os
import re
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
# results and errors reach the user through our own lines
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from clipq_ray import logs
from clipq_ray.cluster import capacity, privacy, ray_data, ray_search, sight
from clipq_ray.cluster.apart import Apart
from clipq_ray.cluster.connection import connect, forget, handlers_kept
from clipq_ray.cluster.engine import Done
from clipq_ray.cluster.failures import Restarts, UnstartedWorkers, low_memory, reason
from clipq_ray.cluster.handout import PLACED_BY
from clipq_ray.cluster.hangs import Limits, Worker
from clipq_ray.cluster.hosts import Hosts
from clipq_ray.cluster.metrics import Meter, TrainingSpeed
from clipq_ray.cluster.room import Amount, Group, Room
from clipq_ray.cluster.talk import ERROR, Watch, tell, told
from clipq_ray.config import Config, make
from clipq_ray.connections import answered
from clipq_ray.errors import ClipqError, ConfigError, RunError, StorageError
from clipq_ray.finetune import Progress
from clipq_ray.memory import Attempts
from clipq_ray.ranks import Rank
from clipq_ray.storage import Store
from clipq_ray.training import TrainTask, train
from clipq_ray.work import CURVE, SearchTask

log = logs.logger(__name__)

_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in a worker as in the job
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt is one, and not the end of a search
}
"""What Ray reads in this process while an engine is entered; a caller's own Ray jobs have theirs again afterwards."""


def _train_loop(given: dict[str, Any]) -> None:
    """What every worker of a training runs."""
    answered()
    task: TrainTask = given["task"]
    with logs.about(task.source.name):
        _train(task, given["board"], *given["decoding"])


def _train(task: TrainTask, board: Any, *decoding: int) -> None:
    output = Store(task.output)
    if output.exists(ERROR):
        return  # a named error ended the attempt before and would end this one; the driver says so
    config, context = task.source.config, ray.train.get_context()
    device = ray.train.torch.get_device() if config.device != "cpu" else torch.device("cpu")
    rank = Rank(context.get_world_rank(), context.get_world_size(), device)
    speed = TrainingSpeed(Meter(), task.source.name, task.stage, config.batch_size)

    board.begin.remote(task.stage, task.stage, Worker.here(), rank.rank, rank.world)

    def progress(done: int, total: int, words: str) -> None:
        if rank.rank == 0:
            board.write.remote(task.stage, done, total, words)
            speed.step(done)

    try:
        feed = ray_data.feed(task.source.config, rank.world, *decoding)
        train(task, rank, progress, lambda row: ray.train.report(row), feed)
    except ClipqError as error:
        tell(output, error)
        raise
    if rank.world > 1:
        dist.barrier()


class _Cluster:
    """What Ray says of the cluster, for `Room`."""

    def available(self) -> Amount:
        return _amount(ray.available_resources())

    def groups(self) -> Mapping[str, Group]:
        table = ray.util.placement_group_table()
        return {
            name: Group(
                one["state"] not in ("PENDING", "PREPARED"), one["strategy"] != PLACED_BY,
                tuple(_amount(bundle) for bundle in one["bundles"].values()),
            )
            for name, one in table.items()
            if one["state"] != "REMOVED"
        }  # fmt: skip


def _amount(resources: Mapping[str, float]) -> Amount:
    return Amount(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


class _LowMemory(ray.train.UserCallback):  # type: ignore[misc]
    """Hears that Ray's memory monitor ended a worker, which cannot say so itself."""

    def __init__(self, checkpoints: str, stage: str) -> None:
        self._place = checkpoints, stage

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        checkpoints, stage = self._place
        for event in {low_memory(error) for error in worker_exceptions.values()}:
            if event is not None:
                with suppress(StorageError):  # the next attempt is as large then
                    Attempts(Store(checkpoints), stage).heard(event)


class RayEngine:
    """Runs tasks on the Ray cluster that `RAY_ADDRESS` or the job names, else on a Ray of its own on this machine.

    `config`: the job's; what it may take of the cluster stands there."""

    parallel = True
    at_once = 1

    def __init__(self, config: Config | None = None) -> None:
        self._config = config or make()
        self._own, self._before = False, dict[str, str | None]()
        self._session: Path | None = None
        self._failed = False
        self._reached: set[Store] = set()
        self._passed_on: set[str] = set()
        self._gpus: dict[str, bool] = {}
        self._meter: Meter | None = None
        self._searching = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(
            prefix="clipq-ray-", ignore_cleanup_errors=True
        )  # where it is interrupted, Tune may still write there

    def __enter__(self) -> Self:
        self._before = {name: os.environ.get(name) for name in _SETTINGS}
        os.environ.update(_SETTINGS)
        self._passed_on = privacy.keep_keys()
        if not ray.is_initialized():
            self._own = True
            settings = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
            self._session = connect(settings)
        grows = bool(os.environ.get("RAY_ADDRESS")) or not self._own
        self._apart = Apart()
        self._room = Room(_Cluster(), self._limit, self._config.search_parallel, grows=grows)
        return self

    def __exit__(self, *error: object) -> None:
        self._room.close()
        self._apart.leave()
        if self._own:
            ray.shutdown()
        if self._session is not None and not self._failed and error[0] is None:
            forget(self._session)  # its logs are of use to whoever looks for a reason
        self._folder.cleanup()
        privacy.pass_on(self._passed_on)
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def reaches(self, storage: Store) -> None:
        """Every node of the cluster is asked, once per storage (`sight`)."""
        if storage not in self._reached:
            sight.check(storage)
            self._reached.add(storage)

    def check(self, config: Config) -> None:
        """`ConfigError` where the cluster has no GPU that is asked for, or no room for the workers, now or when it has grown, or the job may not take so much."""
        worker = self._worker(config)
        self._refuse_beyond_limit(worker.times(config.workers))
        capacity.refuse_too_large(config, worker.resources)

    def committed(self, network: str, bytes_before: int, bytes_after: int) -> None:
        """To the metrics."""
        self._meter = self._meter or Meter()
        self._meter.committed(network, bytes_before, bytes_after)

    def _worker(self, config: Config) -> Amount:
        """What one worker of a training takes."""
        return Amount(config.threads_per_worker, 1 if self._on_gpus(config) else 0)

    def _trial(self, config: Config) -> Amount:
        """What one trial of a search takes."""
        return Amount(config.threads_per_worker, config.search_gpu_share if self._on_gpus(config) else 0)

    def _on_gpus(self, config: Config) -> bool:
        """A device once found is kept, so that a node that is lost does not move the job to CPUs."""
        if config.device not in self._gpus:
            self._gpus[config.device] = capacity.on_gpus(config.device)
        return self._gpus[config.device]

    @property
    def _limit(self) -> Amount:
        """What the job may use at a time."""
        cpus, gpus = self._config.limit_cpus, self._config.limit_gpus
        return Amount(math.inf if cpus is None else cpus, math.inf if gpus is None else gpus)

    def trainings(self, configs: Sequence[Config]) -> int:
        """How many trainings fit at a time, of those that take least, when the cluster has grown and hosts of its file have joined; at least 1. A network that
        can never run here counts for none: `check` names it."""
        able: list[tuple[Config, Amount]] = []
        for config in configs:
            with suppress(ConfigError):
                able.append((config, self._worker(config)))
        limits = [
            self._limit.count(worker.times(config.workers) + Amount(config.least_decode_cpus))
            for config, worker in able
        ]

        def fitting(there: capacity.Capacity) -> int:
            rooms = [there.room(worker.resources) // config.workers for config, worker in able]
            return max((min(pair) for pair in zip(rooms, limits, strict=True)), default=1)

        wanted = min(len(able), max(limits, default=1))
        # at_once is settled here for the whole job, so hosts that come with `ray up` are to be counted; a network alone has no use for that
        there = capacity.joined(lambda found: fitting(found) >= wanted) if wanted > 1 else capacity.look()
        return max(1, fitting(there))

    def _ray_storage(self, near: Store) -> dict[str, Any]:
        """Where Ray keeps what it wants to keep: a temporary folder while there is one node, `near` on a cluster."""
        alone = len([node for node in ray.nodes() if node["Alive"]]) <= 1
        if alone and not os.environ.get("RAY_ADDRESS"):  # a cluster may begin with its head alone
            return {"storage_path": self._folder.name}
        if near.local is not None:
            return {"storage_path": str(near.local)}
        filesystem, path = near.arrow()
        return {"storage_path": path, "storage_filesystem": filesystem}

    def search(
        self,
        tasks: Sequence[SearchTask],
        progress: Progress,
        done: Done,
    ) -> None:
        """One Tuner (`ray_search`); of several threads one at a time, since Ray runs one at a time."""
        amounts = [self._trial(task.source.config) for task in tasks]
        for amount in amounts:
            self._refuse_impossible(amount, 1, 1)

        def run() -> None:
            with ray_search.turn(self._searching, tasks) as later:
                self._apart.check()
                ray_search.search(later, amounts, self._room, self._folder.name, progress, done, self._apart)

        with self._noting():
            if self._own:  # what goes on when this process leaves ends with its Ray
                self._apart.run(run, "search")
            else:
                run()

    def train(self, task: TrainTask, progress: Progress) -> float:
        """One TorchTrainer; gives the seconds that it waited to be let in."""
        config = task.source.config
        worker = self._worker(config)
        self._refuse_impossible(worker, config.workers, config.fewest_workers)
        ray_data.refuse_without_cpus(config)
        decoding = ray_data.counted(config, self.at_once)
        self._room.trainings, rank = self.at_once, (-task.source.priority,)
        with self._noting(), self._room.training(worker, config.workers, rank, Amount(decoding)) as waited:
            self._trained(task.after(waited), worker, decoding, progress)
        return waited

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """That something failed, so that Ray's logs of it are kept."""
        try:
            yield
        except BaseException:
            self._failed = True
            raise

    def _refuse_impossible(self, amount: Amount, most: int, fewest: int) -> None:
        """What could never be let in would wait for ever, `most` of `amount` within the limit, as `Room` counts them, and `fewest` there; with an autoscaler the
        cluster may still grow, so only our own Ray is checked."""
        self._refuse_beyond_limit(amount.times(most))
        if not os.environ.get("RAY_ADDRESS"):
            capacity.refuse_beyond_machine(amount.resources, fewest)

    def _refuse_beyond_limit(self, wanted: Amount) -> None:
        """`ConfigError` where the workers of one training, all of them, take more than the job may at a time."""
        limit = self._limit
        if wanted.cpus > limit.cpus:
            raise ConfigError(
                f"expected --workers x --threads-per-worker at most --limit-cpus ({limit.cpus:g}), got {wanted.cpus:g}; lower one of them, or raise --limit-cpus"
            )
        if wanted.gpus > limit.gpus:
            raise ConfigError(
                f"expected --workers, which take a GPU each, at most --limit-gpus ({limit.gpus:g}), got {wanted.gpus:g}; lower --workers, or raise --limit-gpus"
            )

    def _trained(self, task: TrainTask, worker: Amount, decoding: int, progress: Progress) -> None:
        config = task.source.config
        hosts = Hosts(task.stage, config.fewest_workers, worker.resources)
        attempts = Attempts(Store(task.checkpoints), task.stage)
        attempts.afresh()
        restarts = Restarts(config.max_failures, _last_checkpoint(task))
        with Watch(self._apart, progress, Limits.of([config]), hosts) as watch:
            while (failure := self._fitted(task, worker, decoding, watch.board)) is not None:
                watch.release()
                if Store(task.output).exists(CURVE):
                    return  # a worker was lost, or Ray's own part failed, behind the end
                if not restarts.allowed(failure, _last_checkpoint(task)):
                    why = watch.hangs.error(task.stage) or f"{reason(failure)}; run again to continue"
                    raise RunError(f"{task.stage} failed: {why}") from failure
                self._before_again(task.stage, attempts, failure)

    def _before_again(self, stage: str, attempts: Attempts, failure: Exception) -> None:
        """Say why a training is begun again; where memory was short, the next attempt takes less."""
        event = low_memory(failure)
        if event is None:
            log.warning("%s: %s; it is begun again behind its last checkpoint", stage, reason(failure))
            return
        # Ray's memory monitor has ended actors of Ray Train's own, without which it gives up
        attempts.heard(event)
        attempts.most()
        log.warning("%s: %s; the next attempt takes fewer images at a time", stage, event.rstrip("."))

    def _fitted(self, task: TrainTask, worker: Amount, decoding: int, board: Any) -> Exception | None:
        """One TorchTrainer, and its failure where no worker has named an error."""
        config, gpu = task.source.config, worker.gpus > 0
        trainer = ray.train.torch.TorchTrainer(
            _train_loop,
            train_loop_config={"task": task, "board": board, "decoding": (self.at_once, decoding)},
            scaling_config=ray.train.ScalingConfig(
                num_workers=_world(config), use_gpu=gpu, resources_per_worker=worker.resources
            ),
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if gpu else "gloo"),
            run_config=ray.train.RunConfig(
                name=_run_name(task),
                failure_config=ray.train.FailureConfig(
                    max_failures=config.max_failures,
                    max_preemption_failures=-1 if config.max_failures else 0,
                ),
                callbacks=[_LowMemory(task.checkpoints, task.stage), UnstartedWorkers(board)],
                **self._ray_storage(Store(task.checkpoints)),
            ),
        )
        output, failure = Store(task.output), None
        output.remove(ERROR)  # of a job that was killed
        try:
            with handlers_kept():
                trainer.fit()
        except SystemExit as ended:
            self._apart.check()  # in a thread: Ray was shut down; else Ray Train's own handler of an interrupt
            raise KeyboardInterrupt from ended
        except Exception as error:
            self._apart.check()
            failure = error
        if (named := told(output)) is not None:
            raise named from failure
        return failure


def _run_name(task: TrainTask) -> str:
    """What Ray's own logs and its dashboard call a training."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", task.source.name)
    return f"{plain}-{task.stage}-{uuid.uuid4().hex}"


def _last_checkpoint(task: TrainTask) -> str | None:
    """The name of a training's last checkpoint by now (`Checkpoints`), None where there is none."""
    return max(Store(task.checkpoints).names("epoch-"), default=None)


def _world(config: Config) -> int | tuple[int, int]:
    """Ray Train's number of workers: fixed, or the fewest and the most."""
    if config.fewest_workers == config.workers:
        return config.workers
    return config.fewest_workers, config.workers
