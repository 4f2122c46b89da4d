"""What a run is of: a network and its data, as a value that any process can rebuild both from.

Not covered: where weights come from when they are given (`models.weights`), and what is done with a source (`work`, `training`).
"""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass, field

import torch
from torch import nn

from clipq_ray import models, seeds
from clipq_ray.config import Config, make
from clipq_ray.data import Data, Preprocessing, open_data
from clipq_ray.errors import ConfigError, DataError, ModelError, brief
from clipq_ray.evaluate import gradients, scores
from clipq_ray.groups import grouped
from clipq_ray.network import inventory, refuse_unstorable
from clipq_ray.trainable import training_mode


@dataclass(frozen=True)
class Source:
    """Network and data of a run: by name and URI from `config`, or a module and data that a caller of the Python interface holds; of several, those of
    higher `priority` come first. `ensemble`: the identity of the ensemble whose one intent decides for this network, and `smaller` how many times smaller it is to be as a whole,
    where that is its intent."""

    config: Config
    module: nn.Module | None = field(default=None, compare=False)
    own_data: Data | None = field(default=None, compare=False)
    priority: int = field(default=0, compare=False)
    ensemble: str | None = None
    smaller: float | None = None

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
            network = _copied(self.module).cpu()  # a caller may have trained it on a GPU
        else:
            architecture = self.architecture()
            assert architecture is not None
            with seeds.everywhere(self.config.seed, "initial weights"):
                network = models.build(architecture, allow_import=":" in self.config.model)
        refuse_unstorable(network.state_dict(keep_vars=True))
        return network

    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width [pixels] of the network's input."""
        channels, height, width = models.default_input(self.config.model)
        if ":" in self.config.model:
            channels = self._channels or len(self.config.mean or ()) or channels
        size = self.config.input_size
        return (channels, size, size) if size else (channels, height, width)

    @functools.cached_property
    def _channels(self) -> int | None:
        """What the convolutions of the user's own function take. Other weights than the run's change nothing of that: the run's own may ask for its data."""
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

    def check_fit(self) -> list[str]:
        """Notes on how the network goes with the data. Two images through the network: it must take the data's size, have an output for every label, layers as they are named, and something to train, in batches that it takes, by the
        loss of its class scores. What only training mode does would else be met behind the search."""
        data, network = self.data(), self.network()
        images = data.train.batch(torch.arange(min(2, len(data.train))), None)[0]
        self._check_sides(min(images.shape[2:]))
        whole = all(one.dtype == torch.float32 for one in network.parameters() if one.is_floating_point())
        own = ", and for its channels the numbers of --mean" if ":" in self.config.model else ""
        advice = f"check --model and --input-size{own}" if whole else "call .float() on the network first"
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
        found = inventory(network, images, self.config.keep)
        grouped(network, [layer.name for layer in found.layers], self.config.groups)
        self._check_training(network)
        fewer = outputs > data.classes and self.weights_origin() not in ("train", "random")
        return [
            f"the network tells {outputs} classes apart and the data {data.classes}: labels must be the network's numbers, so folders of all its classes, or --model-args that say how many there are"
        ] * fewer

    def _check_training(self, network: nn.Module) -> None:
        """One step in training mode on two images, or on as many as a worker gets: what splits its batches may take no two."""
        train, workers = self.data().train, self.config.workers
        batch = min(self.config.batch_size, len(train))
        if batch < workers:
            raise DataError(
                f"expected a training image for each of {workers} workers in every step, got {batch}; lower --workers"
            )
        advice = "in training mode, in which it is fine-tuned, it must return class scores (alone, first, or as logits) for images alone"
        if batch < 2 * workers:  # batch norm wants two values of each channel
            advice = f"it may be too few for training: raise --batch-size ({self.config.batch_size}, shared by {workers} workers)"
        few = 1 if batch < 2 * workers else 2
        training_mode(network)
        with seeds.everywhere(self.config.seed, "check"):
            try:
                gradients(network, *train.batch(torch.arange(min(few, len(train))), None), advice)
            except ModelError:
                if batch // workers <= few:
                    raise
                gradients(network, *train.batch(torch.arange(batch // workers), None), advice)

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


def _copied(module: nn.Module) -> nn.Module:
    """A copy that shares nothing; `ModelError` where torch makes none, as of tensors that were computed."""
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"expected a network that can be copied, got: {brief(error, 150)}; make pruning and weight norm permanent (torch.nn.utils.prune.remove, remove_weight_norm), "
            "detach tensors that it keeps from one call to the next, and hold locks, files and the like outside of it"
        ) from error


_DATA_OPTIONS = (
    "data", "data_root", "resize", "interpolation", "mean", "std", "validation_images", "validation_data", "seed", "memory_limit_gib",
    "bad_image_limit", "limit_images", "shift_pixels",
)  # fmt: skip


_OPEN: dict[str, Data] = {}


def _opened_once(data_options: str) -> Data:
    """The data of these options; those of other options are let go first, since two may not fit into memory."""
    if data_options not in _OPEN:
        _OPEN.clear()
        _OPEN[data_options] = _opened(data_options)
    return _OPEN[data_options]


def let_data_go() -> None:
    """Forget what was opened: whoever compresses again in this process may have other images by the same name."""
    _OPEN.clear()


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
        interpolation=config.interpolation,
        usual=Preprocessing.from_json(usual) if usual else None,
        validation_images=config.validation_images,
        validation_uri=config.validation_data,
        seed=config.seed,
        memory_limit_bytes=config.memory_limit_bytes,
        bad_image_limit=config.bad_image_limit,
        limit_images=config.limit_images,
        shift_pixels=config.shift_pixels,
    )
