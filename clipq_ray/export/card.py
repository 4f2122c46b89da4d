"""The model card: YAML for the Hub, then sizes, accuracy and how to load, from the file and its run's manifest.

Accuracies are those that the run measured on the decoded file; without a run there are none. Not covered: claims about anything that was
not measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from clipq_ray import codec
from clipq_ray.export.source import Source
from clipq_ray.summary import bytes_before

LIBRARY = "clipq_ray"
_METHOD = "CLIP-Q (Tung and Mori, CVPR 2018)"


def text(source: Source, dense_bytes: int, base_model: str | None = None) -> str:
    """The whole README.md; `dense_bytes` is the size of model.safetensors."""
    front = yaml.safe_dump(front_matter(source, base_model), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{front}---\n\n" + "\n".join(_body(source, dense_bytes, base_model))


def front_matter(source: Source, base_model: str | None = None) -> dict[str, Any]:
    """What the Hub reads."""
    architecture = (source.packed.metadata.get("architecture") or {}).get("name")
    result: dict[str, Any] = {"library_name": LIBRARY, "pipeline_tag": "image-classification"}
    if base_model:
        result["base_model"] = base_model
    tags = [
        "clip-q",
        "pruning",
        "quantization",
        "model-compression",
        *([architecture] if architecture else []),
    ]
    result |= {"base_model_relation": "quantized", "tags": tags}
    split, scores, data = _measured(source)
    if scores:
        dataset = {"type": _slug(data), "name": data, "split": split}
        metrics = [
            {"type": "accuracy", "name": name, "value": round(scores["compressed"][key], 4)}
            for key, name in (
                ("top1_percent", "Top-1 accuracy in %"),
                ("top5_percent", "Top-5 accuracy in %"),
            )
            if key in scores["compressed"]
        ]
        result["metrics"] = ["accuracy"]
        task = {"type": "image-classification"}
        result["model-index"] = [
            {"name": source.name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}
        ]
    return result


def _measured(source: Source) -> tuple[str, dict[str, Any] | None, str]:
    """Split, the run's scores on it and the data's name; test before validation."""
    run = source.run or {}
    metrics = run.get("metrics") or {}
    described = str((run.get("data") or {}).get("description", "unnamed data"))
    # a card is published: no paths of whoever wrote it
    data = re.sub(r" at .*/([^/]+)/?$", r" at \1", described)
    for split in ("test", "validation"):
        if scores := metrics.get(split):
            return split, scores, data
    return "", None, data


def _slug(name: str) -> str:
    """A name in the manner of the Hub's data sets."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "unnamed"


def _body(source: Source, dense_bytes: int, base_model: str | None) -> Iterator[str]:
    metadata = source.packed.metadata
    yield f"# {source.name}, compressed by {_METHOD}"
    yield ""
    yield (
        f"Weights were pruned and quantized jointly, in training{f', from {base_model}' if base_model else ''}. `model.clq` is the compressed file; "
        "`model.safetensors` holds exactly the numbers that it decodes to, as dense float32."
    )
    yield ""
    yield from _sizes(source, dense_bytes)
    yield from _accuracy(source)
    yield "## Load"
    yield "With clipq_ray:"
    yield ""
    yield from _snippet(*_with_clipq(metadata))
    yield "With torch and safetensors alone:"
    yield ""
    yield from _snippet(*_with_torch(metadata))
    yield from _images(source)
    yield (
        "Weights come back as dense float32: the network takes less storage, not less time. The licence is that of the weights it was made of."
    )
    yield ""


def _sizes(source: Source, dense_bytes: int) -> Iterator[str]:
    layers = [t for t in source.packed.tensors.values() if isinstance(t, codec.CodedLayer)]
    weights = sum(layer.codes.size for layer in layers)
    nonzero = sum(int((layer.codes != 0).sum()) for layer in layers)
    before = ((source.run or {}).get("metrics") or {}).get("bytes_before", bytes_before(source.data))
    size = len(source.data)
    yield "| | bytes |"
    yield "|---|---|"
    yield f"| float32 | {before:,} |"
    yield f"| `model.safetensors` | {dense_bytes:,} |"
    yield f"| `model.clq` | {size:,} ({before / size:.1f}x smaller than float32) |"
    yield ""
    yield f"{len(layers)} quantized layers, {weights:,} weights, {100 * nonzero / max(weights, 1):.1f} % of them not zero."
    yield ""


def _accuracy(source: Source) -> Iterator[str]:
    split, scores, data = _measured(source)
    if not scores:
        return
    names = {"original": "before", "control": "dense control", "compressed": "`model.clq`"}
    yield f"Accuracy on {data}, {split} ({scores['n']:,} images, one run; 95 % interval):"
    yield ""
    yield "| | top-1 | top-5 |"
    yield "|---|---|---|"
    for key, name in names.items():
        if found := scores.get(key):
            yield (
                f"| {name} | {found['top1_percent']:.2f} % ({found['top1_low_percent']:.2f} to {found['top1_high_percent']:.2f}) "
                f"| {found['top5_percent']:.2f} % |"
            )
    yield ""


def _snippet(*lines: str) -> Iterator[str]:
    yield from ("```python", *lines, "```", "")


def _with_clipq(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    factory = "" if metadata.get("architecture") else ", factory=build"
    comment = "a torch.nn.Module in eval mode" + (", built by your own build()" if factory else "")
    return ("import clipq_ray", "", f'network = clipq_ray.load("model.clq"{factory})  # {comment}')


def _with_torch(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    architecture = metadata.get("architecture") or {}
    # Upon the network's own state: safetensors holds no versions of modules' state, which MNASNet asks for, and no auxiliary heads, which
    # inference does not read.
    load = (
        "state = network.state_dict()",
        'state.update(load_file("model.safetensors"))',
        "network.load_state_dict(state)",
    )
    if _of_torchvision(architecture.get("name")):
        options = "".join(f", {key}={value!r}" for key, value in architecture.get("kwargs", {}).items())
        build = (
            f'network = torchvision.models.get_model("{architecture["name"]}", weights=None{options}).eval()'
        )
        return ("import torchvision", "from safetensors.torch import load_file", "", build, *load)
    named = (
        f" a {architecture['name']} as in clipq_ray/models" if architecture else " the network it was made of"
    )
    first, *others = load
    return (
        "from safetensors.torch import load_file",
        "",
        f"{first}  # network:{named}, in eval mode",
        *others,
    )


def _of_torchvision(name: str | None) -> bool:
    from clipq_ray import models

    return name is not None and models.default_weights(name) == "torchvision"


def _images(source: Source) -> Iterator[str]:
    images, classes = source.images, source.packed.metadata.get("classes", "?")
    if not images.get("shape"):
        return
    channels, height, width = images["shape"]
    resize = (
        f", shorter side resized to {images['resize']} ({images.get('interpolation', 'bilinear')}), cropped in the middle"
        if images.get("resize")
        else ""
    )
    normalised = f"pixel values in 0..1, minus {images['mean']}, divided by {images['std']} per channel"
    if images["mean"] is None:
        normalised = "prepared as in training, which the file does not say (its network was given with loaders of one's own, or without normalisation)"
    yield f"Images: {channels} x {height} x {width}{resize}; {normalised}. {classes} classes."
    yield ""
