"""The Ray engine: the search as trials of Ray Tune, trainings on Ray Train.

Search: one Tuner for all networks of a job, one trial per (network, group of layers), the longest first; a trial's actor loads network and images
once and is reused for further groups; every step is one suggestion and its measurement, and what was measured lies in the store as JSON. Training: one TorchTrainer (Train
V2, DDP; NCCL on GPUs, gloo on CPUs), restarted from the last checkpoint in the store when a worker or a node is lost.

Without a running cluster, Ray starts on this machine and ends with the job. Ray's own storage is a temporary folder on one machine, and on a
cluster `_work` of the run for trainings and `_ray` in the stage for a search, removed at its end; nothing that must last lies there, since Tune pickles. Not covered: several searches on one cluster.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clipq_ray.config import Config
from clipq_ray.errors import (
    ArtifactError,
    ClipqError,
    ConfigError,
    DataError,
    FormatError,
    ModelError,
    RunError,
    StorageError,
)
from clipq_ray.finetune import Progress, Rank
from clipq_ray.search import Trial
from clipq_ray.storage import Store
from clipq_ray.work import Searcher, SearchTask, TrainTask, train

log = logging.getLogger(__name__)
_POLL_SECONDS = 0.5
_RAY = "_ray"  # what Tune keeps of a search, for as long as that goes on
_ERROR = "error.json"  # what a worker says to the driver before it fails


@ray.remote(num_cpus=0)
class _Board:
    """Where workers write how far they are and the driver reads it."""

    def __init__(self) -> None:
        self._items: dict[str, tuple[int, int, str]] = {}
        self._latest = ""

    def write(self, item: str, done: int, total: int, words: str) -> None:
        self._items[item] = (done, total, words)
        self._latest = words

    def read(self) -> tuple[int, int, str]:
        done = sum(item[0] for item in self._items.values())
        return done, max((item[1] for item in self._items.values()), default=0), self._latest


class _Watch:
    """Passes the board's content to the driver's progress while Ray blocks the driver."""

    def __init__(self, progress: Progress) -> None:
        here = ray.get_runtime_context().get_node_id()
        # on the driver's node, so that it is lost with the driver only
        near = NodeAffinitySchedulingStrategy(here, soft=False)
        self.board = _Board.options(scheduling_strategy=near).remote()  # type: ignore[attr-defined]
        self._progress, self._end = progress, threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def _poll(self) -> None:
        while not self._end.wait(_POLL_SECONDS):
            self._show()

    def _show(self) -> None:
        done, total, words = ray.get(self.board.read.remote())
        if total:
            self._progress(done, total, words)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        if error[0] is None:
            self._show()
        ray.kill(self.board)


class _GroupTrial(tune.Trainable):  # type: ignore[misc]
    """One group's search; the actor is reused, so a network and its images are loaded once. What was measured lies in the store after every
    evaluation, so an actor that is lost costs the evaluation under way; Tune keeps nothing."""

    def setup(
        self,
        config: dict[str, Any],
        tasks: Sequence[SearchTask],
        places: Sequence[tuple[int, int]],
        board: Any,
    ) -> None:
        self._tasks, self._places, self._board = tasks, places, board
        self._searchers: dict[int, Searcher] = {}
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._number, self._index = self._places[new_config["place"]]
        self._trials: list[Trial] | None = None
        return True

    def step(self) -> dict[str, Any]:
        task = self._tasks[self._number]
        try:
            searcher = self._searcher()
            if self._trials is None:
                self._trials = searcher.begin(self._index)
            finished = searcher.step(self._index, self._trials)
        except StorageError:
            raise  # may pass: Ray tries again
        except ClipqError as error:
            _tell(Store(task.output), error)
            return {"done": True}
        done = (
            task.settings.evaluations if finished else len(self._trials)
        )  # one that ends early counts as whole
        words = task.groups[self._index].name
        if len(self._tasks) > 1:
            words = f"{task.source.name}: {words}"
        self._board.write.remote(f"{self._number} {self._index}", done, evaluations(self._tasks), words)
        return {"done": finished}

    def _searcher(self) -> Searcher:
        task = self._tasks[self._number]
        for number, searcher in self._searchers.items():
            if number != self._number:
                searcher.release()
        if self._number not in self._searchers:
            # those on other images go first: two sets of images may not fit into memory
            same = task.source.data_options
            self._searchers = {
                number: searcher
                for number, searcher in self._searchers.items()
                if searcher.task.source.data_options == same
            }
            self._searchers[self._number] = Searcher(task, _visible_device(task.source.config.device))
        return self._searchers[self._number]


class _Losses(tune.Callback):  # type: ignore[misc]
    """Says in one line what Tune says in a page: a trial was lost and is started again."""

    def __init__(self, tasks: Sequence[SearchTask], places: Sequence[tuple[int, int]]) -> None:
        self._tasks, self._places = tasks, places
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number, index = self._places[trial.config["place"]]
        task = self._tasks[number]
        log.warning(
            "search: the worker of %s, %s, was lost; it goes on behind its last evaluation",
            task.source.name,
            task.groups[index].name,
        )


def _visible_device(wanted: str) -> torch.device:
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _train_loop(given: dict[str, Any]) -> None:
    """What every worker of a training runs."""
    task: TrainTask = given["task"]
    board = given["board"]
    output = Store(task.output)
    if output.exists(_ERROR):
        return  # a named error ended the attempt before and would end this one; the driver says so
    context = ray.train.get_context()
    wanted = task.source.config.device
    device = ray.train.torch.get_device() if wanted != "cpu" else torch.device("cpu")
    rank = Rank(context.get_world_rank(), context.get_world_size(), device)

    def progress(done: int, total: int, words: str) -> None:
        if rank.rank == 0:
            board.write.remote(task.stage, done, total, words)

    try:
        train(task, rank, progress, lambda row: ray.train.report(row))
    except StorageError:
        raise  # may pass: Ray tries again
    except ClipqError as error:
        _tell(output, error)
        raise
    if rank.world > 1:
        dist.barrier()


def _tell(output: Store, error: ClipqError) -> None:
    """Leave a named error for the driver as text: Ray would wrap it beyond recognition."""
    output.write(_ERROR, json.dumps({"kind": type(error).__name__, "error": str(error)}).encode())


def _told(output: Store) -> ClipqError | None:
    """The named error that a worker left, if one did."""
    if not output.exists(_ERROR):
        return None
    told = json.loads(output.read(_ERROR))
    output.remove(_ERROR)
    kind = {
        one.__name__: one for one in (ArtifactError, ConfigError, ModelError, DataError, FormatError)
    }.get(told["kind"], RunError)
    return kind(told["error"])


def _ended(task: SearchTask, lost: Sequence[Exception]) -> ClipqError | None:
    """What ended the search of `task`, if it did not end well; `lost`: what Ray says of groups that it gave up."""
    told = _told(Store(task.output))
    if told is None and lost:
        return RunError(
            f"the search of {len(lost)} layers or groups failed: {_last_line(lost[0])}; run again to continue"
        )
    if told is None and (missing := len(task.open_groups())):
        return RunError(
            f"the search ended before {missing} layers or groups were done; run again to continue"
        )
    return told


@contextmanager
def _settings(**values: str) -> Iterator[None]:
    """Environment variables that Ray reads in this process, for as long as it should."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def in_order(tasks: Sequence[SearchTask]) -> list[tuple[int, int]]:
    """Number of the task and of the group of all open groups, in the order in which they start: those on the same images together, since an actor
    holds one set of images, and the longest first."""
    found = [(number, index) for number, task in enumerate(tasks) for index in task.open_groups()]

    def work(place: tuple[int, int]) -> int:
        task = tasks[place[0]]
        return task.work[place[1]] * task.images * task.settings.evaluations if task.work else 0

    whole: dict[str, int] = {}
    for place in found:
        images = tasks[place[0]].source.data_options
        whole[images] = whole.get(images, 0) + work(place)

    def rank(place: tuple[int, int]) -> tuple[int, str, int]:
        images = tasks[place[0]].source.data_options
        return -whole[images], images, -work(place)

    return sorted(found, key=rank)


def evaluations(tasks: Sequence[SearchTask]) -> int:
    """Evaluations of all groups of all tasks, were none to end early."""
    return sum(len(task.groups) * task.settings.evaluations for task in tasks)


def _search_resources(config: Config) -> dict[str, float]:
    """What one trial takes."""
    resources: dict[str, float] = {"CPU": config.threads_per_worker}
    if _cluster_has_gpu(config.device):
        resources["GPU"] = config.search_gpu_share
    _refuse_more_than_there_is(resources, 1)
    return resources


class RayEngine:
    """Runs tasks on the Ray cluster that `RAY_ADDRESS` or the job names, else on a Ray of its own on this machine."""

    parallel = True

    def __init__(self) -> None:
        self._own = False
        self._folder = tempfile.TemporaryDirectory(prefix="clipq-ray-")

    def __enter__(self) -> Self:
        if ray.is_initialized():
            return self
        self._own = True
        settings = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**settings)
        else:
            os.environ.setdefault("RAY_worker_niceness", "0")
            ray.init(address="local", include_dashboard=False, **settings)
        return self

    def __exit__(self, *error: object) -> None:
        if self._own:
            ray.shutdown()
        self._folder.cleanup()

    def _ray_storage(self, near: Store) -> dict[str, Any]:
        """Where Ray keeps what it wants to keep: a temporary folder while there is one node, `near` on a cluster."""
        if len([node for node in ray.nodes() if node["Alive"]]) <= 1:
            return {"storage_path": self._folder.name}
        if near.local is not None:
            return {"storage_path": str(near.local)}
        filesystem, path = near.arrow()
        return {"storage_path": path, "storage_filesystem": filesystem}

    def search(self, tasks: Sequence[SearchTask], progress: Progress) -> list[ClipqError | None]:
        """All open groups of all tasks as trials of one Tuner, at most the smallest `search_parallel` of the tasks at a time."""
        places = in_order(tasks)
        if not places:
            return [None for _ in tasks]
        resources = [_search_resources(task.source.config) for task in tasks]
        caps = [task.source.config.search_parallel for task in tasks]
        with _Watch(progress) as watch:
            total = evaluations(tasks)
            for number, task in enumerate(tasks):
                Store(task.output).remove(_ERROR)  # of a job that was killed
                missing = sum(place[0] == number for place in places)
                there = (len(task.groups) - missing) * task.settings.evaluations
                watch.board.write.remote(f"{number} before", there, total, task.source.name)
            trainable = tune.with_parameters(_GroupTrial, tasks=list(tasks), places=places, board=watch.board)
            tuner = tune.Tuner(
                tune.with_resources(
                    trainable,
                    lambda config: tune.PlacementGroupFactory([resources[places[config["place"]][0]]]),
                ),
                param_space={"place": tune.grid_search(list(range(len(places))))},
                tune_config=tune.TuneConfig(
                    reuse_actors=True, max_concurrent_trials=min((cap for cap in caps if cap), default=None)
                ),
                run_config=tune.RunConfig(
                    name=_RAY,
                    verbose=0,
                    callbacks=[_Losses(tasks, places)],
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    failure_config=tune.FailureConfig(
                        max_failures=max(task.source.config.max_failures for task in tasks)
                    ),
                    **self._ray_storage(Store(tasks[0].output)),
                ),
            )
            with _settings(RAY_CHDIR_TO_TRIAL_DIR="0", TUNE_DISABLE_SIGINT_HANDLER="1"):
                results = tuner.fit()
            Store(tasks[0].output).child(_RAY).remove_tree()
        lost: dict[int, list[Exception]] = {number: [] for number in range(len(tasks))}
        for result in results:
            if result.error is not None:
                lost[places[result.config["place"]][0]].append(result.error)
        return [_ended(task, lost[number]) for number, task in enumerate(tasks)]

    def train(self, task: TrainTask, progress: Progress) -> None:
        """One TorchTrainer."""
        config = task.source.config
        gpu = _cluster_has_gpu(config.device)
        resources = {"CPU": config.threads_per_worker, "GPU": 1 if gpu else 0}
        _refuse_more_than_there_is(resources, config.workers)
        with _Watch(progress) as watch:
            trainer = ray.train.torch.TorchTrainer(
                _train_loop,
                train_loop_config={"task": task, "board": watch.board},
                scaling_config=ray.train.ScalingConfig(
                    num_workers=config.workers, use_gpu=gpu, resources_per_worker=resources
                ),
                torch_config=ray.train.torch.TorchConfig(backend="nccl" if gpu else "gloo"),
                run_config=ray.train.RunConfig(
                    name=f"{task.stage}-{uuid.uuid4().hex}",
                    failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
                    **self._ray_storage(Store(task.checkpoints)),
                ),
            )
            output, failure = Store(task.output), None
            output.remove(_ERROR)  # of a job that was killed
            try:
                trainer.fit()
            except Exception as error:
                failure = error
            if (told := _told(output)) is not None:
                raise told from failure
            if failure is not None:
                raise RunError(
                    f"{task.stage} failed: {_last_line(failure)}; run again to continue"
                ) from failure


def _cluster_has_gpu(wanted: str) -> bool:
    """Whether work goes to GPUs: what the option says, or what the cluster has."""
    there = ray.cluster_resources().get("GPU", 0) >= 1
    if wanted == "cuda" and not there:
        raise ConfigError("--device: expected a GPU in the cluster, got none; use --device cpu")
    return wanted != "cpu" and there


def _refuse_more_than_there_is(resources: dict[str, Any], workers: int) -> None:
    """An impossible request would wait forever; with an autoscaler the cluster may still grow, so only our own Ray is checked."""
    if os.environ.get("RAY_ADDRESS"):
        return
    there = ray.cluster_resources().get("CPU", 0)
    wanted = workers * (resources.get("cpu") or resources.get("CPU") or 0)
    if wanted > there:
        raise ConfigError(
            f"expected --workers x --threads-per-worker at most the machine's {there:.0f} CPUs, got {wanted}; lower one of them"
        )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
