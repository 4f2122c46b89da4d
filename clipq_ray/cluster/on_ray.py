"""The Ray engine: the search as trials of Ray Tune, trainings on Ray Train.

Search: one Tuner, one trial per (network, layer); a trial's actor loads network and images once and is reused for further layers;
every step is one suggestion and its measurement, and a trial's state is its list of trials as JSON. Training: one TorchTrainer (Train
V2, DDP; NCCL on GPUs, gloo on CPUs), restarted from the last checkpoint in the store when a worker or a node is lost.

Without a running cluster, Ray starts on this machine and ends with the job. Ray's own storage is a temporary folder on one machine and
`_work` of the run on a cluster; nothing that must last lies there, since Tune pickles. Not covered: several searches on one cluster.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
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
from ray import tune

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
        self.board = _Board.remote()  # type: ignore[attr-defined]
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


class _LayerTrial(tune.Trainable):  # type: ignore[misc]
    """One layer's search; the actor is reused, so network and images are loaded once."""

    def setup(self, config: dict[str, Any], task: SearchTask, board: Any) -> None:
        self._searcher = Searcher(task, _visible_device(task.source.config.device))
        self._task, self._board = task, board
        self._begin(config)

    def _begin(self, config: dict[str, Any]) -> None:
        self._index: int = config["index"]
        self._trials: list[Trial] = self._searcher.begin(self._index)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        try:
            finished = self._searcher.step(self._index, self._trials)
        except StorageError:
            raise  # may pass: Ray tries again
        except ClipqError as error:
            _tell(Store(self._task.output), error)
            return {"done": True, "trials": len(self._trials)}
        each = self._task.settings.evaluations
        layer = self._task.layers[self._index]
        done = each if finished else len(self._trials)  # a layer that ends early counts as whole
        self._board.write.remote(layer, done, len(self._task.layers) * each, layer)
        return {"done": finished, "trials": len(self._trials)}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        text = json.dumps([trial.to_json() for trial in self._trials])
        Path(checkpoint_dir, "trials.json").write_text(text, encoding="utf-8")

    def load_checkpoint(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            text = Path(checkpoint, "trials.json").read_text(encoding="utf-8")
            self._trials = [Trial(**row) for row in json.loads(text)]


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


def _raise_told(output: Store, cause: Exception | None) -> None:
    """Raise the named error that a worker left, if one did."""
    if not output.exists(_ERROR):
        return
    told = json.loads(output.read(_ERROR))
    output.remove(_ERROR)
    kind = {
        one.__name__: one for one in (ArtifactError, ConfigError, ModelError, DataError, FormatError)
    }.get(told["kind"], RunError)
    raise kind(told["error"]) from cause


class RayEngine:
    """Runs tasks on the Ray cluster that `RAY_ADDRESS` or the job names, else on a Ray of its own on this machine."""

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

    def search(self, task: SearchTask, progress: Progress) -> None:
        """All open layers as trials of one Tuner."""
        open_layers = task.open_layers()
        if not open_layers:
            return
        config = task.source.config
        gpu = _cluster_has_gpu(config.device)
        resources = {"cpu": config.threads_per_worker, "gpu": 1 if gpu else 0}
        _refuse_more_than_there_is(resources, 1)
        with _Watch(progress) as watch:
            for index, layer in enumerate(task.layers):
                if index not in {i for i, _ in open_layers}:
                    each = task.settings.evaluations
                    watch.board.write.remote(layer, each, len(task.layers) * each, layer)
            trainable = tune.with_parameters(_LayerTrial, task=task, board=watch.board)
            tuner = tune.Tuner(
                tune.with_resources(trainable, resources),
                param_space={"index": tune.grid_search([index for index, _ in open_layers])},
                tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=config.search_parallel),
                run_config=tune.RunConfig(
                    name="search",
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=config.max_failures),
                    **self._ray_storage(Store(task.output)),
                ),
            )
            output = Store(task.output)
            output.remove(_ERROR)  # of a job that was killed
            errors = tuner.fit().errors
        _raise_told(output, None)
        if errors:
            raise RunError(
                f"the search of {len(errors)} layers failed: {_last_line(errors[0])}; run again to continue"
            )

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
                    name=f"{task.stage}-{os.getpid()}",
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
            _raise_told(output, failure)
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
