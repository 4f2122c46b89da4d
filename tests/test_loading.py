"""A compressed network comes back as what was packed, or not at all."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused
from torch import nn

import clipq_ray
from clipq_ray import codec, models
from clipq_ray.errors import ArtifactError, FormatError, ModelError


def packed(model: nn.Module, name: str | None, drop: str = "", kwargs: object = None) -> codec.Packed:
    tensors = {
        n: (t.float() if t.dtype == torch.bfloat16 else t).numpy()
        for n, t in model.state_dict().items()
        if n != drop and t.is_floating_point()
    }
    architecture = {"name": name, "kwargs": kwargs or {"num_classes": 10}} if name else None
    return codec.Packed({"architecture": architecture}, tensors)


def written(tmp_path: Path, content: codec.Packed) -> Path:
    path = tmp_path / "model.clq"
    path.write_bytes(codec.encode(content))
    return path


@pytest.mark.parametrize("name", ["lenet5", "resnet20", "mnasnet0_5"])
def test_a_registered_network_comes_back_in_eval_mode(name: str, tmp_path: Path) -> None:
    model = models.build(models.architecture(name, 10, {}))
    path = written(tmp_path, packed(model, name))
    loaded = clipq_ray.load(path)
    assert not loaded.training
    for key, value in clipq_ray.load_state_dict(path).items():
        expected = torch.from_numpy(np.asarray(codec.stored(model.state_dict()[key].numpy())))
        assert torch.equal(value, expected)
        assert torch.equal(loaded.state_dict()[key], expected)


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    model = models.build(models.architecture("lenet5", 10, {}))
    with pytest.raises(ModelError, match=r"the file lacks its fc1\.weight"):
        clipq_ray.load(written(tmp_path, packed(model, "lenet5", drop="fc1.weight")))


def test_a_network_of_ones_own_needs_its_factory(tmp_path: Path) -> None:
    path = written(tmp_path, packed(nn.Linear(3, 2), None))
    with pytest.raises(ModelError, match="factory"):
        clipq_ray.load(path)
    assert isinstance(clipq_ray.load(path, factory=lambda: nn.Linear(3, 2)), nn.Linear)


class Tied(nn.Module):
    """Two layers with one weight, a half-precision one, and a buffer that no state dict holds."""

    def __init__(self, hidden: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.short = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2).half()
        self.b.weight = self.a.weight
        self.register_buffer("offset", torch.ones(2, dtype=torch.bfloat16))
        if hidden:
            self.register_buffer("hidden", torch.ones(2), persistent=False)


def test_a_factory_without_memory_gives_ties_and_types_as_they_were(tmp_path: Path) -> None:
    made = Tied()
    content = packed(made, None, drop="b.weight")
    content.metadata["ties"] = {"b.weight": "a.weight"}
    path = written(tmp_path, content)

    def empty(hidden: bool = False) -> nn.Module:
        with torch.device("meta"):
            return Tied(hidden)

    for loaded in (clipq_ray.load(path, factory=empty), clipq_ray.load(path, factory=Tied)):
        assert isinstance(loaded, Tied)
        assert loaded.a.weight is loaded.b.weight
        assert loaded.short.weight.dtype == torch.float16
        assert loaded.get_buffer("offset").dtype == torch.bfloat16
        assert torch.allclose(loaded.a.weight, made.a.weight, rtol=2**-10)
    with pytest.raises(ModelError, match="hidden"):
        clipq_ray.load(path, factory=lambda: empty(True))


def test_one_name_is_taken_as_one_name(tmp_path: Path) -> None:
    path = written(tmp_path, packed(nn.Linear(3, 2), None))
    assert list(clipq_ray.load_state_dict(path, "bias")) == ["bias"]


def test_a_name_that_no_tensor_has_is_refused_with_the_nearest(tmp_path: Path) -> None:
    path = written(tmp_path, packed(Tied(), None))
    with pytest.raises(ArtifactError, match=r"got b\.bais; nearest names: b\.bias"):
        clipq_ray.load_state_dict(path, ["b.bais"])


def test_a_file_cannot_make_the_loader_import_code(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^expected a registered network, got 'os:getcwd'; pass factory= "):
        clipq_ray.load(written(tmp_path, packed(nn.Linear(3, 2), "os:getcwd")))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("mobilenet_v2", {"inverted_residual_setting": [[1, 16, 3_000_000, 1]]}),
        ("mobilenet_v2", {"inverted_residual_setting": [[1e9, 16, 1, 1]]}),
        ("mobilenet_v2", {"width_mult": 1e9}),
        ("resnet18", {"num_classes": 10**12}),
        ("resnet20", {"num_classes": 10**25}),
        ("lenet5", {"num_classes": 10**12}),
        ("vit_b_16", {"image_size": 10**6}),
        ("vit_b_16", {"image_size": 10**9}),
        ("regnet_x_400mf", {"stem_width": 10**7}),  # cannot be built without memory
        ("regnet_x_400mf", {"num_classes": 10**12}),
    ],
)
def test_a_small_file_cannot_make_the_loader_build_a_large_network(
    name: str, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    content = codec.Packed({"architecture": {"name": name, "kwargs": kwargs}}, {})
    path = written(tmp_path, content)
    assert path.stat().st_size < 100
    limit, before = 4 << 30, resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, before[1]))
    try:
        with refused(ModelError, match="factory"):
            clipq_ray.load(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_factory_that_returns_no_network_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, packed(nn.Linear(3, 2), None))
    forgotten: Any = lambda: None  # noqa: E731
    with refused(ModelError, match="expected a factory that returns a network, got NoneType; return it"):
        clipq_ray.load(path, factory=forgotten)


def test_a_buffer_that_the_file_lacks_does_not_lift_the_limit(tmp_path: Path) -> None:
    named = {"name": "mobilenet_v2", "kwargs": {"num_classes": 10, "width_mult": 40.0}}
    with refused(ModelError, match=r"at most 1,002 tensors and 16,777,232 elements"):
        clipq_ray.load(
            written(tmp_path, codec.Packed({"architecture": named}, {"x": np.ones(8, np.float32)}))
        )


def test_further_names_of_a_tensor_do_not_lift_the_limit_of_elements(tmp_path: Path) -> None:
    named = {"name": "mobilenet_v2", "kwargs": {"num_classes": 10, "width_mult": 40.0}}
    ties = {f"x{number}": "x" for number in range(1000)}
    content = codec.Packed({"architecture": named, "ties": ties}, {"x": np.ones(1 << 20, np.float32)})
    with refused(ModelError, match=r"at most 3,002 tensors and 18,874,368 elements"):
        clipq_ray.load(written(tmp_path, content))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("mobilenet_v2", {"inverted_residual_setting": [[1, 16, 1, 1], [6, 24, 2, 2]], "width_mult": 0.5}),
        ("resnet18", {"replace_stride_with_dilation": [False, False, False], "zero_init_residual": True}),
        ("regnet_x_400mf", {"stem_width": 16}),
    ],
)
def test_arguments_of_every_kind_that_a_network_was_made_with_load(
    name: str, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    architecture = models.architecture(name, 10, kwargs)
    model = models.build(architecture)
    tensors: dict[str, Any] = {key: value.numpy() for key, value in model.state_dict().items()}
    loaded = clipq_ray.load(
        written(tmp_path, codec.Packed({"architecture": architecture.to_json()}, tensors))
    )
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_heads_that_the_file_does_not_hold_are_within_the_limit(tmp_path: Path) -> None:
    architecture = models.architecture("googlenet", 1000, {"aux_logits": True})
    model = models.build(architecture)
    state = model.state_dict()
    dropped = [name for name in state if name.startswith("aux")]
    tensors: dict[str, Any] = {name: value.numpy() for name, value in state.items() if name not in dropped}
    loaded = clipq_ray.load(
        written(tmp_path, codec.Packed({"architecture": architecture.to_json(), "dropped": dropped}, tensors))
    )
    assert loaded.state_dict()["aux1.fc2.weight"].isnan().all()


def test_a_long_name_of_a_network_is_refused_in_a_short_line(tmp_path: Path) -> None:
    named = {"name": "resnet" * 2_000_000, "kwargs": {}}
    with refused(ModelError, match="expected a known network") as caught:
        clipq_ray.load(written(tmp_path, codec.Packed({"architecture": named}, {})))
    assert len(str(caught.value)) < 1000


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.clq").write_bytes(b"PK\x03\x04 something else entirely")
    with pytest.raises(FormatError, match="CLQ"):
        clipq_ray.load(tmp_path / "x.clq")
