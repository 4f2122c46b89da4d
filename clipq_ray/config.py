"""The configuration of one compression: frozen, validated at once, with units in the names.

`Config` is the single source of every option: the command line (`clipq_ray.options`), a YAML file and the Python interface all make one.
Not covered: whether files exist or a network fits its data, which the baseline stage finds out before hours are spent.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from clipq_ray import problems
from clipq_ray.consistency import INTENTS, PAPER, problem
from clipq_ray.errors import ConfigError

MOST = 1_000_000
"""Of epochs, images of a step, GiB, hours and minutes: what is larger is a slip, and would end in an overflow."""


class Config(BaseModel):
    """Everything that decides a run; one field is one option."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # What is compressed
    model: str = Field(
        "lenet5",
        description="network: a built-in or torchvision name, or package.module:function; the job takes several, searched together: --model A --model B",
    )
    name: str | None = Field(
        None, description="name of the result in the storage; default: the network's name"
    )
    weights: str | None = Field(
        None,
        min_length=1,
        description="URI of trained weights (.safetensors, .pt); 'torchvision' for its published ones; 'train' to train them first; "
        "'random': as the network is made, which keeps weights that your own function loads. Default: torchvision's for its networks, 'train' for all others",
    )
    model_args: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the network, as JSON"
    )
    keep: tuple[str, ...] = Field(
        (),
        description="names or patterns of weights to store as they are (as float16 where that is within a thousandth), comma-separated",
    )

    # Data
    data: str = Field(
        default_factory=lambda: os.environ.get("CLIPQ_DATA") or "digits",
        description="digits, a torchvision set by name, or URI of Parquet files or of an image folder; CLIPQ_DATA in the environment takes the place of the default",
    )
    data_root: str | None = Field(
        None, min_length=1, description="folder that holds the files of a torchvision set"
    )
    validation_data: str | None = Field(
        None, description="URI of validation images that the network has not seen"
    )
    validation_images: int | None = Field(
        None,
        ge=2,
        description="images held out of training for decisions; default: 10 %, two at least and 5,000 at most",
    )
    limit_images: int | None = Field(None, ge=4, description="use only so many training images, for trials")
    input_size: int | None = Field(
        None,
        ge=8,
        le=4096,
        description="height and width of the input [pixels]; default: the network's, 224 of package.module:function",
    )
    resize: int | None = Field(
        None,
        ge=8,
        le=8192,
        description="shorter side before the centre crop [pixels]; default: none where images have the input's size, else that of torchvision's weights or 256/224 of the input",
    )
    interpolation: Literal["auto", "bilinear", "bicubic"] = Field(
        "auto",
        description="of images that are resized; auto: what torchvision's published weights want, else bilinear",
    )
    shift_pixels: int | None = Field(
        None,
        ge=0,
        le=1024,
        description="largest random shift of training images that already have the input's size [pixels]; default: an eighth of the input",
    )
    mean: tuple[float, ...] | None = Field(
        None,
        description="mean per channel, of values in 0..1, comma-separated; default: that of torchvision's weights, else the data's usual",
    )
    std: tuple[float, ...] | None = Field(
        None,
        description="standard deviation per channel; default: that of torchvision's weights, else the data's usual",
    )
    memory_limit_gib: float = Field(
        4.0,
        gt=0,
        le=MOST,
        description="decoded images of the network's input size are held in memory up to this size [GiB]; those that are resized are decoded in every epoch",
    )
    bad_image_limit: int = Field(
        0,
        ge=0,
        description="unreadable images that are skipped before the run stops; of images that are streamed, those that one worker meets",
    )

    # Where
    storage: str = Field(
        default_factory=lambda: os.environ.get("CLIPQ_STORAGE") or "./runs",
        description="URI of the results: a folder, or s3://bucket/prefix; CLIPQ_STORAGE in the environment takes the place of the default",
    )
    force: bool = Field(False, description="make a new run although one with the same inputs is committed")

    on_claim: Literal["wait", "leave"] = Field(
        "wait",
        description="where another job makes the same run, or a stage that this one needs: wait for its end and take its result, or leave with exit code 1",
    )

    # Intent
    max_drop: float | None = Field(
        None,
        ge=0,
        le=100,
        description="the smallest file that loses at most so much top-1 on validation images against the reference (dense control, or the "
        "original where it has not seen them) [points]; default 0 unless another intent is given",
    )
    target_ratio: float | None = Field(
        None, gt=1, le=10_000, description="intent instead: bytes before over bytes of the file, at least"
    )
    target_bytes: int | None = Field(None, ge=1, description="intent instead: bytes of the file, at most")
    tradeoff: float | None = Field(
        None,
        gt=0,
        description="intent instead, without a promise: lambda of the paper, error that one whole network's worth of saved bits may cost",
    )

    paper: bool = Field(
        False,
        description="the method as published: pruning rates, plan and vectors without what was added here; options that say otherwise are refused",
    )
    rounds: int = Field(
        3,
        ge=1,
        le=20,
        description="rounds of fine-tuning that may be needed to keep the promise with the smallest file",
    )
    round_epochs: int | None = Field(
        None, ge=1, le=MOST, description="epochs of each further round; default: half of --epochs"
    )
    rungs: int = Field(
        1,
        ge=1,
        le=20,
        description="with a size: rounds of fine-tuning on the way to it, each asked for a file that is smaller by the same factor; 1: the size at once, as published",
    )
    rung_epochs: int | None = Field(
        None, ge=1, le=MOST, description="epochs of each of them but the last; default: half of --epochs"
    )
    search_again: bool = Field(
        False,
        description="search before each further round too, from the weights of the round before",
    )

    # The file
    profile: Literal["fast", "small"] = Field(
        "fast",
        description="coders that layers choose from; small takes 3 to 5 % less than fast, encodes at a 25th of its speed and decodes at a 17th",
    )
    vectors: Literal["auto", "exact"] = Field(
        "auto",
        description="batch norm, biases and levels; auto: folded, on the coarsest grids that cost at most 0.05 points and one standard error on validation images, "
        "levels as float16 within a relative error of 2^-10; exact: not folded, float16 within that error, levels only where it is exact, else float32",
    )

    dead_units: Literal["drop", "keep"] = Field(
        "drop",
        description="weights and biases that no output needs, of units that feed nothing or say the same for every image; drop: they are zero in the file",
    )

    unit_order: Literal["sorted", "given"] = Field(
        "sorted",
        description="units that lead to one next layer only; sorted: those with most weights first, as they take the fewest bytes; given: as they are. The network's function is the same",
    )

    # Search
    search_images: int = Field(2000, ge=2, description="training images that score one (p, b)")
    search_evaluations: int = Field(18, ge=4, le=910, description="evaluations per layer, at most")
    search_start: int = Field(
        4,
        ge=3,
        le=100,
        description="evaluations per layer before the Gaussian process is asked, at points from the layer's curves of size and distortion",
    )
    search_stop_gain: float = Field(
        0.1,
        ge=0,
        description="a layer's search ends when the largest expected improvement over all lambdas is below the error on this many images; "
        "0: never [images]",
    )
    search_loss_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="how far the loss stands for the top-1 error in the search's model; 0: the paper's error alone",
    )

    search_early_stop: bool = Field(
        False,
        description="with --tradeoff: search at this lambda alone, and end an evaluation once it cannot win; its points serve no other lambda",
    )
    groups: tuple[str, ...] = Field(
        (),
        description="layers that share one (p, b): blocks (residual blocks, inception modules), network (all), or patterns, comma-separated, of which "
        "each is a group; default: every layer has its own",
    )
    search_cache_gib: float = Field(
        2.0,
        ge=0,
        le=MOST,
        description="of a network's values before the layer that is searched, kept by each search trial, at most half of the memory over the CPUs, or half of its share of a GPU's [GiB]; "
        "images beyond it are evaluated whole",
    )

    # Fine-tuning
    epochs: int = Field(20, ge=1, le=MOST, description="epochs of fine-tuning with the operator in the loop")
    batch_size: int = Field(128, ge=1, le=MOST, description="images per step, over all workers")
    learning_rate: float = Field(0.02, gt=0, description="peak of the cosine schedule, per step")
    warmup_epochs: float = Field(0.5, ge=0, description="epochs of linear warm-up")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD (Nesterov)")
    weight_decay: float = Field(1e-4, ge=0, description="weight decay of SGD")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing of the loss")
    cutout_pixels: int = Field(
        0,
        ge=0,
        le=1024,
        description="side of a square at a random place of each training image that is set to 0, the mean of normalised ones, against knowing them by heart [pixels]; 0: none",
    )
    ramp_share: float = Field(
        0.0,
        ge=0,
        le=0.9,
        description="part of each round in which pruning rates rise to the plan's, from mild ones or from those of the round before; 0: the plan's at once, as published",
    )
    hold_size: bool = Field(
        False,
        description="where a size is asked for: in the second half of a round, behind its ramp, pruning rates follow what the file would take",
    )
    rate_distortion: float = Field(
        0.0,
        ge=0,
        le=1,
        description="weights are clipped sooner where they cost the file more: magnitudes are divided by the bits of their row, column and place of a kernel over the mean bits, to this power; 0: one threshold for a layer, as published",
    )
    batch_norm_images: int = Field(
        4096, ge=2, description="training images that re-estimate batch norm after fine-tuning"
    )
    level_epochs: int = Field(
        0,
        ge=0,
        le=MOST,
        description="further epochs in which clipped weights stay clipped, and levels, biases and batch norm are trained; kept where validation images like that better and a size that is asked for is kept; with --hold-size codes are trained, too, for which 4 % of the size are left",
    )
    level_learning_rate: float = Field(
        0.01,
        gt=0,
        description="peak rate of these epochs; too low where levels lie so far apart that no weight comes from one to the next",
    )
    baseline_epochs: int = Field(
        10, ge=1, le=MOST, description="epochs of training when the weights are trained first"
    )
    baseline_learning_rate: float = Field(
        0.1, gt=0, description="peak rate when the weights are trained first"
    )
    control: Literal["auto", "always", "never"] = Field(
        "auto",
        description="dense control: schedule of the first round and of those on the way to it, without the operator; auto: where the network has seen the validation images",
    )

    # Guards
    expect_top1_percent: float | None = Field(
        None,
        ge=0,
        le=100,
        description="top-1 that the original should have; far from it (2 points, and more than chance of so few images) the run stops [%]",
    )
    deadline_hours: float | None = Field(
        None,
        gt=0,
        le=MOST,
        description="the run commits its best within this time, with fewer evaluations and epochs if it must; of several networks each takes its share of "
        "what is left when its turn comes [h]",
    )
    dry_run: bool = Field(False, description="print plan, evaluations, predicted time and disk; do nothing")

    # How
    engine: Literal["ray", "local"] = Field(
        "ray", description="ray: on the cluster, or on this machine; local: one process, no Ray"
    )
    workers: int = Field(1, ge=1, le=1024, description="data-parallel workers of fine-tuning")
    min_workers: int | None = Field(
        None,
        ge=1,
        description="where the cluster has fewer hosts, or has had the others for less than 20 s, a training begins or goes on with as few workers, and takes up hosts "
        "that join after 60 to 80 s, behind its last epoch; then the promise holds, and the bytes may be others. "
        "Default: --workers, so it waits for a lost host",
    )
    threads_per_worker: int = Field(
        1, ge=1, le=256, description="CPU threads of a worker and of a search trial"
    )
    search_parallel: int | None = Field(
        None,
        ge=1,
        description="trials of the search at a time, so that others keep their share; default: what the cluster has",
    )
    trainings: int | None = Field(
        None, ge=1, description="fine-tunings of several networks at a time; default: what the cluster has"
    )
    limit_cpus: int | None = Field(
        None,
        ge=1,
        description="CPUs that the job's trials and trainings take at a time, decoders of --decode cluster included, so that others keep their share; "
        "default: what the cluster has",
    )
    limit_gpus: int | None = Field(None, ge=1, description="the same for GPUs")
    search_gpu_share: float = Field(
        1.0, ge=0.01, le=1, description="of a GPU for each trial of the search: 0.25 runs four on one"
    )
    decode: Literal["auto", "worker", "cluster"] = Field(
        "auto",
        description="where images that are not held in memory (--memory-limit-gib) are read and decoded: by the training's worker, or by Ray Data on CPUs of any node; "
        "auto: there, where the cluster has CPUs beyond those of the workers and --limit-cpus is not given",
    )
    decode_cpus: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPUs that decode for each worker, at most; default: its share of what the workers leave",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where there is one")
    evaluation_batch_size: int = Field(250, ge=1, le=MOST, description="images per batch without gradients")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "float32",
        description="of training's forward and backward passes (autocast); auto: bfloat16 where the device computes in it, float32 where it would only "
        "emulate it; weights, levels and evaluation are float32",
    )
    max_failures: int = Field(
        3,
        ge=0,
        description="restarts of a training, or of one search of a layer, whose worker was lost, hung or did not start; a training has as many again wherever it has made a checkpoint since; 0: none",
    )
    stall_minutes: float = Field(
        30.0,
        gt=0,
        le=MOST,
        description="a worker that makes no step for so long hangs: it is ended and started again [min]",
    )
    attempt_hours: float | None = Field(
        None,
        gt=0,
        le=MOST,
        description="a training, or one search of a layer, that takes longer is ended and goes on behind its last checkpoint, as often as "
        "--max-failures; default: no limit [h]",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of every random choice")

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes`, `no`, `on` and `off` as switches, which would pass for 1 and 0."""
        name = info.field_name
        if isinstance(value, bool) and name and cls.model_fields[name].annotation is not bool:
            raise ValueError("expected a value that is no yes or no")
        return value

    @model_validator(mode="before")
    @classmethod
    def _said_otherwise(cls, given: Any) -> Any:
        """No loss where nothing else is wanted, and lists as one text or one number: one configuration, however it is said."""
        if not isinstance(given, dict):
            return given
        listed = {
            name: tuple(part.strip() for part in str(given[name]).split(",") if part.strip())
            for name, kinds in (
                ("keep", str),
                ("groups", str),
                ("mean", str | int | float),
                ("std", str | int | float),
            )
            if isinstance(given.get(name), kinds) and not isinstance(given[name], bool)
        }
        published = {name: value for name, value in PAPER.items() if name not in given}
        wanted = published if given.get("paper") in (True, "true", "True") else {}
        wanted |= {} if any(given.get(name) is not None for name in INTENTS) else {"max_drop": 0.0}
        return {**given, **listed, **wanted}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if found := problem(self):
            raise ValueError(found)
        return self

    @property
    def result_name(self) -> str:
        """The name of the result in the storage."""
        return self.name or self.model.replace(":", ".")

    @property
    def fewest_workers(self) -> int:
        """With how few workers a training goes on."""
        return self.min_workers or self.workers

    @property
    def least_decode_cpus(self) -> int:
        """CPUs of the cluster that a training's images take at least while they are decoded there."""
        return self.workers if self.decode == "cluster" else 0

    @property
    def memory_limit_bytes(self) -> int:
        """The limit of decoded images in memory, in bytes."""
        return math.floor(self.memory_limit_gib * 2**30)

    @property
    def search_cache_bytes(self) -> int:
        """What a search trial keeps of the network before its layer, in bytes."""
        return math.floor(self.search_cache_gib * 2**30)


def make(**options: Any) -> Config:
    """A validated configuration; `ConfigError` in one line names every option that is wrong."""
    found, wrong = checked(options)
    if found is None:
        raise ConfigError("; ".join(text for _, text in wrong))
    return found


def checked(options: Mapping[str, Any]) -> tuple[Config | None, list[tuple[str | None, str]]]:
    """The configuration, or None and what is wrong: a line each, with the option that it is about if it is about one."""
    try:
        return Config(**options), []
    except ValidationError as error:
        return None, [
            (str(d["loc"][0]) if d["loc"] else None, problems.line(d, list(Config.model_fields)))
            for d in error.errors()
        ]
