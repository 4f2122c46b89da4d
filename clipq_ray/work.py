"""What a job works on as a value that any process can rebuild network and data from, and the search of one network's layers as a unit of work.

A task is a value; what it makes lies in a store when it ends, whole. The same functions run in the driver's process and on a cluster, so both engines give
the same result. Not covered: who starts it (`cluster`), and training (`training`).
"""

from __future__ import annotations

import copy
import functools
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from clipq_ray import codec, models, seeds
from clipq_ray.config import Config, make
from clipq_ray.data import Data, Preprocessing, Split, open_data
from clipq_ray.data.resident import placed
from clipq_ray.data.sampling import stratified
from clipq_ray.errors import ConfigError, DataError, FormatError, ModelError
from clipq_ray.evaluate import scores
from clipq_ray.groups import Group
from clipq_ray.operator import bake_keeping
from clipq_ray.plan import Plan
from clipq_ray.precision import exact_float32
from clipq_ray.search import LayerEvaluator, Settings, Trial, step_group
from clipq_ray.states import put_state, read_state
from clipq_ray.storage import Store

LATE = "late.json"
"""Whether a deadline cut some group short."""
CURVE = "curve.json"


@dataclass(frozen=True)
class Source:
    """Network and data of a run: by name and URI from `config`, or a module and data that a caller of the Python interface holds; of several, those of
    higher `priority` come first. `ensemble`: the identity of the ensemble whose one intent decides for this network."""

    config: Config
    module: nn.Module | None = field(default=None, compare=False)
    own_data: Data | None = field(default=None, compare=False)
    priority: int = field(default=0, compare=False)
    ensemble: str | None = None

    def architecture(self) -> models.Architecture | None:
        """The registered architecture; None for a caller's own module."""
        if self.module is not None:
            return None
        # a network that is trained here gets the data's classes; trained weights bring their own
        fresh = self.weights_origin() in ("train", "random")
        classes = self.data().classes if fresh else None
        return models.architecture(
            self.config.model, classes, self.config.model_args, allow_import=":" in self.config.model
        )

    @functools.cached_property
    def definition(self) -> str | None:
        """What a network that is not registered computes, as it was when it was first asked for; None for others."""
        if self.module is not None:
            return models.definition_sha256(self.module)
        if ":" not in self.config.model:
            return None
        return models.definition_sha256(self.network(), models.imported(self.config.model))

    @functools.cached_property
    def frozen(self) -> list[str]:
        """The parameters that a training leaves alone, as a user's own code may want it."""
        if self.module is None and ":" not in self.config.model:
            return []
        return [name for name, one in self.network().named_parameters() if not one.requires_grad]

    def weights_origin(self) -> str:
        """Where the weights come from: a URI, "torchvision", "train", "random" or "module"."""
        if self.module is not None:
            return self.config.weights or "module"
        return self.config.weights or models.default_weights(self.config.model)

    def wants_control(self) -> bool:
        """Whether a dense control is trained: where the given network has seen the validation images, or always. What a user's own code makes may hold weights
        that have seen them, whatever they are called."""
        origin = self.weights_origin()
        own = self.module is not None or ":" in self.config.model
        seen = self.data().validation_held_out and origin != "train" and (own or origin != "random")
        return self.config.control == "always" or (self.config.control == "auto" and seen)

    def network(self) -> nn.Module:
        """A new network with weights seeded by the run."""
        if self.module is not None:
            return copy.deepcopy(self.module).cpu()  # a caller may have trained it on a GPU
        architecture = self.architecture()
        assert architecture is not None
        with seeds.everywhere(self.config.seed, "initial weights"):
            return models.build(architecture, allow_import=":" in self.config.model)

    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width [pixels] of the network's input."""
        channels, height, width = models.default_input(self.config.model)
        if ":" in self.config.model:
            channels = len(self.config.mean or self.config.std or ()) or self._channels or channels
        size = self.config.input_size
        return (channels, size, size) if size else (channels, height, width)

    @functools.cached_property
    def _channels(self) -> int | None:
        """What the first convolution of the user's own function takes. Other weights than the run's change nothing of that: the run's own may ask for its data."""
        with seeds.everywhere(self.config.seed, "initial weights"):
            own = models.Architecture(self.config.model, self.config.model_args)
            return models.image_channels(models.build(own, allow_import=True))

    def usual(self) -> Preprocessing | None:
        """How images are prepared unless the user says otherwise: for torchvision's published weights as these want it, in proportion where the input has
        another size; None: as is usual for images of so many channels."""
        wanted = None
        if self.module is None and self.weights_origin() == "torchvision":
            wanted = models.published_input(self.config.model)
        if wanted is None:
            return None
        shape = self.input_shape()
        resize = round(shape[1] * wanted.resize / wanted.size)
        return Preprocessing(shape, resize, wanted.mean, wanted.std, wanted.interpolation)

    @property
    def name(self) -> str:
        """The name of the result in the storage."""
        return self.config.result_name

    @property
    def data_options(self) -> str:
        """What decides which images are held in memory; sources with the same share them."""
        if self.own_data is not None:
            return "own"
        options = {name: getattr(self.config, name) for name in _DATA_OPTIONS}
        usual = self.usual()
        return json.dumps([options, self.input_shape(), usual and usual.to_json()], sort_keys=True)

    def data(self) -> Data:
        """The data, opened once per process."""
        return self.own_data if self.own_data is not None else _opened_once(self.data_options)

    def check(self) -> None:
        """Find a user's mistakes in a second: an unknown name, arguments that do not fit."""
        if self.module is None:
            models.default_weights(self.config.model)
            if self.weights_origin() not in ("train", "random"):
                self.architecture()

    def check_fit(self) -> None:
        """One image through the network: it must take the data's size, have an output for every label, and something to train, in batches that it takes."""
        data, network = self.data(), self.network()
        images = data.train.batch(torch.arange(min(2, len(data.train))), None)[0]
        self._check_sides(min(images.shape[2:]))
        whole = all(one.dtype == torch.float32 for one in network.parameters() if one.is_floating_point())
        advice = "check --model and --input-size" if whole else "call .float() on the network first"
        with torch.inference_mode():
            outputs = scores(network.eval(), images, advice).shape[-1]
        if outputs < data.classes:
            raise DataError(
                f"expected labels below the network's {outputs} outputs, got {data.classes} classes; check --model-args and --data"
            )
        if not any(one.requires_grad for one in network.parameters()):
            raise ModelError(
                "expected parameters to fine-tune, got a network without any that has requires_grad; call .requires_grad_(True) on it first"
            )
        if min(self.config.batch_size, len(data.train)) < 2 * self.config.workers:
            advice = f"it may be too few for training: raise --batch-size ({self.config.batch_size}, shared by {self.config.workers} workers)"
            scores(network.train(), images[:1], advice)  # batch norm wants two values of each channel

    def _check_sides(self, pixels: int) -> None:
        """What moves or masks an image must leave something of it."""
        for option, given, advice in (
            ("--shift-pixels", self.config.shift_pixels or 0, "an eighth is usual"),
            ("--cutout-pixels", self.config.cutout_pixels, "a half is usual"),
        ):
            if given >= pixels:
                raise ConfigError(
                    f"expected {option} below the {pixels} pixels of the images, got {given}, which leaves nothing of some; {advice}"
                )

    def device(self) -> torch.device:
        """The device for work that is not placed by a cluster; the job itself may run on a head without a GPU, whatever its workers have."""
        wanted, there = self.config.device, torch.cuda.is_available()
        if wanted == "cuda" and not there and self.config.engine == "local":
            raise ConfigError("--device: expected a GPU on this machine, got none; use --device cpu")
        return torch.device("cuda" if there and wanted != "cpu" else "cpu")


_DATA_OPTIONS = (
    "data", "data_root", "resize", "mean", "std", "validation_images", "validation_data", "seed", "memory_limit_gib",
    "bad_image_limit", "limit_images", "shift_pixels",
)  # fmt: skip


_OPEN: dict[str, Data] = {}


def _opened_once(data_options: str) -> Data:
    """The data of these options; those of other options are let go first, since two may not fit into memory."""
    if data_options not in _OPEN:
        _OPEN.clear()
        _OPEN[data_options] = _opened(data_options)
    return _OPEN[data_options]


def _opened(data_options: str) -> Data:
    given, input_shape, usual = json.loads(data_options)
    config = make(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})
    return open_data(
        config.data,
        data_root=config.data_root or "data",
        input_shape=tuple(input_shape),
        mean=config.mean,
        std=config.std,
        resize="auto" if config.resize is None else config.resize,
        usual=Preprocessing.from_json(usual) if usual else None,
        validation_images=config.validation_images,
        validation_uri=config.validation_data,
        seed=config.seed,
        memory_limit_bytes=config.memory_limit_bytes,
        bad_image_limit=config.bad_image_limit,
        limit_images=config.limit_images,
        shift_pixels=config.shift_pixels,
    )


def prepare_process(threads: int) -> None:
    """Threads and kernels are configuration, not inherited: equal inputs give equal bytes."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    exact_float32()


def read_record(store: Store, name: str) -> dict[str, Any]:
    """The JSON object that a stage has left."""
    try:
        found = json.loads(store.read(name))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
    except ValueError as error:
        words = " ".join(str(error).split())
        raise FormatError(
            f"expected a JSON object at {store.uri}/{name}, got {words}; remove {store.uri} and run again"
        ) from error
    return found


def here(deadline: float | None, store: Store) -> float | None:
    """A deadline by the clock of the storage as a time of this process's `time.monotonic()`, which no change of a clock moves afterwards."""
    return None if deadline is None else time.monotonic() + deadline - store.now()


def later(deadline: float | None, share: float, seconds: float) -> float | None:
    """A deadline that left a part `share` of the time until the end, of what could not begin for `seconds` since."""
    return None if deadline is None else deadline + (1 - share) * seconds


@dataclass(frozen=True)
class SearchTask:
    """The search of one network: one object of trials per group of layers is written to `output`.

    `work`: what an evaluation of each group costs beside others [FLOP]. `plan`: how all layers are compressed beside the group that is searched; None:
    they are not. After `deadline`, by the clock of the storage [s since 1970], a group ends with
    what it has, at least one trial; it leaves the search a part `deadline_share` of the time that there was when it was set.
    """

    source: Source
    weights: str
    groups: tuple[Group, ...]
    settings: Settings
    images: int
    network_bytes: int
    output: str
    deadline: float | None = None
    work: tuple[int, ...] = ()
    plan: Plan | None = None
    deadline_share: float = 1.0

    def after(self, seconds: float) -> SearchTask:
        """The same where it could not begin for `seconds`, which all stages before the end lose, not the search alone."""
        return replace(self, deadline=later(self.deadline, self.deadline_share, seconds))

    def open_groups(self) -> list[int]:
        """The numbers of the groups whose trials are not there yet, the longest first."""
        there = set(Store(self.output).names("group-"))
        missing = [index for index in range(len(self.groups)) if group_name(index) not in there]
        return sorted(missing, key=lambda index: -self.work[index] if self.work else 0)


def group_name(index: int) -> str:
    """The object that holds one group's trials."""
    return f"group-{index:04d}.json"


def partial_name(index: int) -> str:
    """The object that holds one group's trials until the group is done."""
    return f"partial-{index:04d}.json"


def _to_json(trials: Sequence[Trial]) -> bytes:
    return json.dumps([trial.to_json() for trial in trials]).encode()


def read_trials(task: SearchTask) -> dict[str, list[Trial]]:
    """All groups' trials by name, in the order of the network."""
    store = Store(task.output)
    result = {}
    for index, group in enumerate(task.groups):
        try:
            result[group.name] = [Trial(**row) for row in json.loads(store.read(group_name(index)))]
        except (ValueError, TypeError) as error:
            raise FormatError(
                f"expected trials at {store.uri}/{group_name(index)}, got {error}; remove the object and run again"
            ) from error
    return result


class Searcher:
    """Searches groups of layers of one network in this process; network and images are loaded once."""

    def __init__(self, task: SearchTask, device: torch.device) -> None:
        config = task.source.config
        prepare_process(config.threads_per_worker)
        self.task = task
        model = task.source.network()
        put_state(model, read_state(Store(task.weights)))
        full = {} if task.plan is None else bake_keeping(model, task.plan)
        self._deadline = here(task.deadline, Store(task.output))
        self._until: float | None = None
        self._evaluator = LayerEvaluator(
            model,
            placed(
                search_images(
                    task.source.data().train, task.images, config.seed, shuffled=task.settings.early_stop
                ),
                device,
            ),
            task.network_bytes,
            batch_size=config.evaluation_batch_size,
            device=device,
            node=platform.node(),
            size=functools.partial(layer_bytes, config),
            cache_bytes=min(config.search_cache_bytes, _fair_share(device, config.search_gpu_share)),
            full=full,
            rates={layer.layer: layer.theta.p for layer in task.plan.layers} if task.plan else None,
        )

    def release(self) -> None:
        """Keep nothing of the network until the next step: another one is searched meanwhile."""
        self._evaluator.release()

    def begin(self, index: int, behind: int = 0) -> list[Trial]:
        """The trials of group `index` that an attempt before left behind; `behind`: groups of other networks that wait behind those of this one."""
        store, name = Store(self.task.output), partial_name(index)
        self._until = self._share(behind)
        if not store.exists(name):
            return []
        try:
            return [Trial(**row) for row in json.loads(store.read(name))]
        except (ValueError, TypeError):  # of another version; what is measured anew is at most one group
            return []

    def _share(self, behind: int) -> float | None:
        """The time of `time.monotonic()` by which a group that begins now should end: its share of what is left, beside those under way."""
        if self._deadline is None:
            return None
        under_way = 1 + len(Store(self.task.output).names("partial-"))
        groups = max(len(self.task.open_groups()) + behind, 1)
        left = max(0.0, self._deadline - time.monotonic())
        return time.monotonic() + left * min(1.0, under_way / groups)

    def step(self, index: int, trials: list[Trial]) -> bool:
        """One more trial of group `index`, if one is worth measuring; True when the group is done, and then its trials are stored."""
        made = step_group(self._evaluator, self.task.groups[index], trials, self.task.settings)
        late = self._until is not None and time.monotonic() > self._until
        if made is not None and len(trials) < self.task.settings.evaluations:
            if not late:
                Store(self.task.output).write(partial_name(index), _to_json(trials))
                return False
            Store(self.task.output).write(LATE, b"{}")
        Store(self.task.output).write(group_name(index), _to_json(trials))
        Store(self.task.output).remove(partial_name(index))
        return True


def _fair_share(device: torch.device, gpu_share: float) -> int:
    """Bytes that one of as many trials as a machine runs may keep: results do not depend on it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1] * min(gpu_share, 1.0)) // 2
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(memory) // (2 * (os.cpu_count() or 1))


def layer_bytes(config: Config, layer: codec.CodedLayer) -> int:
    """What `layer` takes in the file that this configuration writes."""
    stored = layer.halved() if config.vectors == "auto" else layer
    return codec.layer_bytes(stored, config.profile)


def search_images(train_split: Split, images: int, seed: int, *, shuffled: bool = False) -> Split:
    """The seeded subset of the training images that scores the search, in the order of the files, or `shuffled`, so that the first speak for all.

    Where images are read in groups it lies in as few as can be: every evaluation that does not find them in memory reads these whole.
    """
    draw = seeds.generator(seed, "search images")
    if train_split.groups is None:
        order = torch.randperm(len(train_split), generator=draw)[:images]
    else:
        n = min(images, len(train_split))
        rows = torch.from_numpy(stratified(train_split.labels, n, seed, "search images", train_split.groups))
        order = rows[torch.randperm(n, generator=draw)]
    return train_split.subset(order if shuffled else order.sort().values)
