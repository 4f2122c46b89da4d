"""What a file says of its network's input is what those who prepare images can take, or the file is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import spec_decoder
from crafted import crafted
from refusals import refused
from spec_coders import Refused

from clipq_ray import codec
from clipq_ray.data import Preprocessing
from clipq_ray.data.preprocessing import Interpolation
from clipq_ray.errors import ArtifactError, FormatError

ROOT = Path(__file__).resolve().parents[2]
RGB = {"shape": [3, 224, 200], "resize": 256, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
GRAY = {"shape": [1, 28, 28], "resize": None, "mean": [0], "std": [1]}


@pytest.mark.parametrize(
    "images",
    [
        RGB,
        GRAY,
        RGB | {"interpolation": "bicubic"},
        RGB | {"resize": 224},
        RGB | {"resize": 8192, "later": [1]},
        GRAY | {"shape": [1, 8192, 8192]},
        GRAY | {"mean": [-1e30], "std": [1e-30]},
    ],
)
def test_an_input_that_images_can_be_prepared_for_is_read(images: dict[str, Any]) -> None:
    data = crafted({"m": {"input": images}})
    assert codec.metadata(data)["input"] == images == spec_decoder.decode(data)[0]["input"]
    assert Preprocessing.from_json(images).input_shape == tuple(images["shape"])


@pytest.mark.parametrize(
    "images",
    [
        None,
        5,
        [],
        {},
        *({key: value for key, value in RGB.items() if key != missing} for missing in RGB),
        *(RGB | {"shape": shape} for shape in (5, None, [3, 224], [3, 224, 200, 1], [3, 0, 1], [3, -224, 200])),
        *(RGB | {"shape": shape} for shape in ([3, 224.0, 200], [3, True, 1], ["3", 224, 200], [3, 8193, 1])),
        {"shape": [8192] * 3, "resize": None, "mean": [0.5] * 8192, "std": [0.5] * 8192},
        {"shape": [2, 8192, 4097], "resize": None, "mean": [0.5] * 2, "std": [0.5] * 2},  # of 2^26 and more
        *(RGB | {"resize": resize} for resize in (0, -1, 223, 8193, 10**30, 256.0, True, "256", [256])),
        *(RGB | {"mean": mean} for mean in (0.5, None, "abc", [0.5], [0.5] * 4, [0.5, 0.5, None], [True] * 3)),
        *(RGB | {"std": std} for std in (0.5, None, [0.5] * 2, [0.5, 0.5, 0], [0.5, 0.5, -1], [[1], [1], [1]])),
        RGB | {"interpolation": None},
        RGB | {"interpolation": 3},
    ],
)  # fmt: skip
def test_an_input_that_nobody_can_prepare_images_for_is_refused(images: Any) -> None:
    data = crafted({"m": {"input": images}})
    with refused(ArtifactError, match=r"metadata of the \.clq file has something else than input should be"):
        codec.metadata(data)
    with pytest.raises(Refused):
        spec_decoder.decode(data)


def tied(ties: dict[str, str]) -> bytes:
    """A file of two tensors."""
    return crafted({"n": ["a", "b"], "s": [[1], [1]], "c": ["q", "q"], "m": {"ties": ties}}, *[b"\0\0"] * 2)


def test_a_name_is_a_tensor_of_the_file_or_another_ones_name() -> None:
    good = tied({"c": "a", "d": "a"})
    assert codec.decode(good).metadata["ties"] == {"c": "a", "d": "a"} == spec_decoder.decode(good)[0]["ties"]
    for ties, words in (
        ({"b": "a"}, "ties 'b' to another tensor, and holds it as well"),
        ({"c": "a", "a": "a"}, "ties 'a' to another tensor, and holds it as well"),
        ({"c": "d", "d": "a"}, "ties a name to 'd', which it does not hold"),
    ):
        for read in (codec.metadata, codec.decode):
            with refused(ArtifactError, match=words):
                read(tied(ties))
        with pytest.raises(Refused):
            spec_decoder.decode(tied(ties))
    with pytest.raises(ArtifactError, match="ties 'a' to another tensor"):
        codec.encode(codec.Packed({"ties": {"a": "b"}}, {one: np.ones(2, np.float32) for one in "ab"}))


def test_what_a_reader_would_refuse_is_not_written() -> None:
    with pytest.raises(ArtifactError, match="input"):
        codec.encode(codec.Packed({"input": RGB | {"std": [0, 1, 1]}}, {"b": np.ones(2, np.float32)}))


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "bench" / "records").glob("*.clq")), *sorted((ROOT / "tests" / "golden").glob("*.clq"))],
    ids=lambda path: path.stem,
)
def test_files_that_were_made_before_state_what_they_always_did(path: Path) -> None:
    stated = codec.metadata(path.read_bytes())
    if "input" in stated:
        assert Preprocessing.from_json(stated["input"]).to_json() == stated["input"]


@pytest.mark.parametrize(
    "content",
    [
        {"n": ["w"], "s": [[1]], "c": ["\x1b[2J"], "m": {}},
        {"needs": ["\x1b[2J"], "m": {}},
        {"n": "\x1b[2J", "m": {}},
        {"n": ["w"], "s": ["\x1b[2J"], "c": ["q"], "m": {}},
        {"b": [["\x1b[2J", 1]], "k": "q", "m": {}},
        {"v": [["w", [1]]], "k": "\x1b[2J", "m": {}},
        {"m": {"input": "\x1b[2J"}},
        {"m": {"ties": {"a": "\x1b[2J"}}},
    ],
)
def test_an_error_does_not_say_control_characters_of_a_file(content: dict[str, Any]) -> None:
    blobs = [bytes(8)] if content.keys() & {"n", "b", "v"} else []
    with pytest.raises(ArtifactError) as caught:
        codec.decode(crafted(content, *blobs))
    assert "\x1b" not in str(caught.value)


def test_the_prose_says_what_a_reader_takes_as_classes_and_as_interpolation() -> None:
    prose = (ROOT / "clipq_ray" / "codec" / "SPEC.md").read_text(encoding="utf-8")
    assert "`classes`, a whole number, 0 or more" in prose
    assert codec.metadata(crafted({"m": {"classes": 0}}))["classes"] == 0
    for value in (10.0, -1, True):
        with pytest.raises(ArtifactError):
            codec.metadata(crafted({"m": {"classes": value}}))
    assert f"takes {' and '.join(f'`{one}`' for one in get_args(Interpolation))};" in prose
    other = crafted({"m": {"input": RGB | {"interpolation": "lanczos"}}})
    with pytest.raises(FormatError, match="expected interpolation bilinear or bicubic"):
        Preprocessing.from_json(codec.metadata(other)["input"])
