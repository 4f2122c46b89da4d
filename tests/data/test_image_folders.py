"""Folders of images, on a local directory and on S3."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import pytest
import torch
from data_files import CLASSES, folder, number_of, parquet, png, write
from PIL import Image
from refusals import refused

from clipq_ray import packing
from clipq_ray.data import Data, Preprocessing, open_data, open_test
from clipq_ray.data.decoding import Encoded
from clipq_ray.data.encoded import EncodedSplit
from clipq_ray.data.folders import ImageFiles, Rows
from clipq_ray.data.listing import Listing
from clipq_ray.data.tensors import TensorSplit
from clipq_ray.errors import DataError, StorageError
from clipq_ray.storage import Store

pytest_plugins = ["s3_server"]


def opened(uri: str, **options) -> Data:
    return open_data(uri, **{"input_shape": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3, **options})


@pytest.mark.parametrize("limit", [1000, 10**8])
def test_classes_are_the_folders_and_every_image_is_found(storage_uri: str, limit: int) -> None:
    store = Store(storage_uri)
    for number in range(24):
        store.write(
            f"{'train' if number < 18 else 'test'}/{CLASSES[number % 3]}/{number:03d}.png", png(number)
        )
    store.write("train/.hidden/x.png", b"no image")
    store.write("README.txt", b"about")
    data = opened(storage_uri, memory_limit_bytes=limit)
    assert isinstance(data.train, TensorSplit if limit > 1000 else EncodedSplit)
    assert (data.class_names, len(data.train), len(data.validation)) == (CLASSES, 16, 2)
    assert data.test is not None
    images, labels = data.test.batch(torch.arange(6), None)
    found = [number_of(image * 255) for image in images.numpy()]
    assert sorted(found) == list(range(18, 24))
    assert [number % 3 for number in found] == labels.tolist()


def test_a_val_folder_is_the_test_set_and_large_images_are_cropped(tmp_path: Path) -> None:
    folder(tmp_path, "train", 30, (30, 20))
    folder(tmp_path, "val", 6, (20, 30), first=100)
    data = opened(str(tmp_path))
    assert (data.preprocessing.resize, len(data.test or []), data.validation_held_out) == (9, 6, True)
    indices = data.train.order(torch.Generator().manual_seed(0))[:4]
    first, second = (data.train.batch(indices, torch.Generator().manual_seed(1))[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("names", [("training", "testing", "valid"), ("Train", "TEST", "Validation")])
def test_folders_of_splits_may_be_called_in_all_the_usual_ways(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name, count in zip(names, (30, 6, 9), strict=True):
        folder(tmp_path, name, count, first=100 * count)
    data = opened(str(tmp_path))
    assert (len(data.train), len(data.test or []), len(data.validation)) == (30, 6, 9)


def test_validation_folders_follow_the_training_classes(tmp_path: Path) -> None:
    folder(tmp_path / "a", "train", 30)
    for name in ("one", "two"):
        write(tmp_path / "own", {f"bee/{name}.png": png(1 if name == "one" else 4)})
    data = opened(str(tmp_path / "a"), validation_uri=str(tmp_path / "own"))
    assert (data.validation.labels.tolist(), data.validation_held_out) == ([1, 1], False)
    write(tmp_path / "own", {"wasp/1.png": png(1)})
    with pytest.raises(DataError, match=r"expected the classes .* got wasp"):
        opened(str(tmp_path / "a"), validation_uri=str(tmp_path / "own"))


@pytest.mark.parametrize("pixels", [(8, 8), (30, 20)])
def test_the_test_folder_decides_nothing_also_under_its_own_name(
    tmp_path: Path, pixels: tuple[int, int]
) -> None:
    folder(tmp_path, "train", 30, pixels)
    folder(tmp_path, "val", 6, pixels, first=100)
    with pytest.raises(DataError, match="other than the test images"):
        opened(str(tmp_path), validation_uri=str(tmp_path / "val"))
    folder(tmp_path / "own", "val", 6, pixels, first=200)
    data = opened(str(tmp_path), validation_uri=str(tmp_path / "own"))
    assert not any("held out" in note for note in data.notes)


@pytest.mark.parametrize("memory", [1000, 10**8])
def test_copies_of_the_test_images_are_the_test_images_whatever_they_are_called(
    tmp_path: Path, memory: int
) -> None:
    folder(tmp_path, "train", 30)
    folder(tmp_path, "test", 6, first=100)
    for file in (tmp_path / "test").rglob("*.png"):
        write(tmp_path, {f"val/{file.parent.name}/copy{file.name}": file.read_bytes()})
    with pytest.raises(DataError, match="other than the test images"):
        opened(str(tmp_path), memory_limit_bytes=memory)


def test_a_folder_of_test_images_alone_judges_a_network_with_its_classes(tmp_path: Path) -> None:
    write(tmp_path, {f"{name}/1.png": png(number) for number, name in enumerate(("bee", "cat"), 1)})
    preprocessing = Preprocessing((3, 8, 8), None, (0.0,) * 3, (1.0,) * 3)
    split, kind = open_test(str(tmp_path), preprocessing, 3, ("ant", "bee", "cat"))
    images, labels = split.batch(torch.arange(2), None)
    assert (kind, [number_of(image * 255) for image in images.numpy()], labels.tolist()) == (
        "test",
        [1, 2],
        [1, 2],
    )
    with pytest.raises(DataError, match=r"expected the classes .* got cat"):
        open_test(str(tmp_path), preprocessing, 2, ("ant", "bee"))
    with pytest.raises(DataError, match=r"a folder for each of 3 classes .* got 2"):
        open_test(str(tmp_path), preprocessing, 3)
    write(tmp_path / "numbers", {f"{name}/1.png": png(name) for name in (3, 7)})
    assert open_test(str(tmp_path / "numbers"), preprocessing, 10)[0].labels.tolist() == [3, 7]


def test_beside_training_images_the_networks_order_of_classes_decides_too(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write(tmp_path, {f"{name}/{one}/{n}.png": png(n) for one in ("ant", "bee") for n in range(10)})
    preprocessing = Preprocessing((3, 8, 8), None, (0.0,) * 3, (1.0,) * 3)
    split, kind = open_test(str(tmp_path), preprocessing, 2, ("bee", "ant"))
    assert (kind, split.labels.tolist()) == ("test", [1] * 10 + [0] * 10)


def test_training_images_alone_judge_nothing_and_validation_images_do(tmp_path: Path) -> None:
    preprocessing = Preprocessing((3, 8, 8), None, (0.0,) * 3, (1.0,) * 3)
    folder(tmp_path / "a", "train", 30)
    with refused(DataError, match=r"expected labelled test images at .*, got training images only.*; give"):
        open_test(str(tmp_path / "a"), preprocessing, 3, CLASSES)
    folder(tmp_path / "own", "validation", 6, first=100)
    split, kind = open_test(str(tmp_path / "own"), preprocessing, 3, CLASSES)
    assert (len(split), kind) == (6, "validation")
    split, kind = open_test(str(tmp_path / "own" / "validation"), preprocessing, 3, CLASSES)
    assert (len(split), kind) == (6, "test")
    folder(tmp_path / "a", "val", 6, first=100)
    split, kind = open_test(str(tmp_path / "a"), preprocessing, 3, CLASSES)
    assert (len(split), kind) == (6, "test")  # as in the report of a job on them


@pytest.mark.parametrize("names", [range(12), range(1, 12, 2)])
def test_folders_called_by_the_numbers_of_classes_without_names_are_those_classes(
    tmp_path: Path, names: range
) -> None:
    """Whose order as text is another one."""
    write(tmp_path, {f"own/{name}/1.png": png(name) for name in names})
    rows = [png(100 + number) for number in range(48)]
    write(tmp_path / "rows", {"train.parquet": parquet(rows, [number % 12 for number in range(48)], ())})
    preprocessing = Preprocessing((3, 8, 8), None, (0.0,) * 3, (1.0,) * 3)
    judged, _ = open_test(str(tmp_path / "own"), preprocessing, 12)
    decides = opened(str(tmp_path / "rows"), validation_uri=str(tmp_path / "own")).validation
    if names == range(12):  # whose labels were others when the order of the names alone decided
        listing = Listing.of(str(tmp_path / "own"))
        marks = {
            ImageFiles(listing, list(listing.sizes), "", order).fingerprint
            for order in (sorted(map(str, names)), list(map(str, names)))
        }
        assert len(marks) == 2
    for split in (judged, decides):
        images, labels = split.batch(torch.arange(len(names)), None)
        assert [number_of(image * 255) for image in images.numpy()] == labels.tolist()


def test_folders_that_are_not_all_classes_decide_nothing_beside_data_without_names(tmp_path: Path) -> None:
    """The class folders behind the one that is not there would be other classes."""
    rows = [png(100 + number) for number in range(30)]
    write(tmp_path / "rows", {"train.parquet": parquet(rows, [number % 3 for number in range(30)], ())})
    write(tmp_path, {f"own/{name}/1.png": png(number) for number, name in enumerate(CLASSES[1:])})
    with refused(DataError, match=r"expected a folder for each of 3 classes at .*own, got 2; give all"):
        opened(str(tmp_path / "rows"), validation_uri=str(tmp_path / "own"))
    # a class that training images lack
    write(tmp_path / "rows", {"test.parquet": parquet([png(200 + at) for at in range(4)], [0, 1, 2, 3], ())})
    write(tmp_path, {f"four/{name}/1.png": png(number) for number, name in enumerate("abcd")})
    assert opened(str(tmp_path / "rows"), validation_uri=str(tmp_path / "four")).classes == 4


def test_folders_called_by_numbers_in_an_order_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {f"{name}/1.png": png(name) for name in range(1, 11)})
    preprocessing = Preprocessing((3, 8, 8), None, (0.0,) * 3, (1.0,) * 3)
    with refused(
        DataError, match=r"expected folders called 0 to 9, .*; call each by the number of its class"
    ):
        open_test(str(tmp_path), preprocessing, 10)


@pytest.mark.parametrize("called", ["{}", "{:03d}"])
def test_folders_called_by_numbers_are_judged_as_they_were_trained_on(tmp_path: Path, called: str) -> None:
    """Also where a file holds no names of so many classes."""
    for split in ("train", "test"):
        files = {called.format(one): png(one + 101 * (split == "test")) for one in range(101)}
        write(tmp_path, {f"{split}/{name}/{n}.png": data for name, data in files.items() for n in range(2)})
    data = opened(str(tmp_path))
    names = data.class_names if packing._holds_names(data.class_names) else ()
    assert bool(names) is (called == "{}")
    judged, _ = open_test(str(tmp_path), data.preprocessing, data.classes, names)
    assert data.test is not None
    assert judged.labels.tolist() == data.test.labels.tolist()


@pytest.mark.parametrize("memory", [1000, 10**8])
def test_training_images_judge_nothing_whatever_they_are_called(tmp_path: Path, memory: int) -> None:
    folder(tmp_path, "train", 30)
    for file in (tmp_path / "train").rglob("*.png"):
        write(tmp_path, {f"test/{file.parent.name}/copy{file.name}": file.read_bytes()})
    with refused(DataError, match="expected test images other than the training images, got the same"):
        opened(str(tmp_path), memory_limit_bytes=memory)


def test_one_class_is_none(tmp_path: Path) -> None:
    write(tmp_path, {f"train/all/{number}.png": png(number) for number in range(9)})
    with refused(DataError, match="expected at least two classes, got all alone .*; give the folder that"):
        opened(str(tmp_path))


@pytest.mark.parametrize(("names", "classes", "labels"), [(CLASSES, 3, [0, 1, 2]), ((3, 7), 10, [3, 7])])
def test_a_folder_is_listed_once(
    tmp_path: Path,
    names: tuple[object, ...],
    classes: int,
    labels: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for split in ("train", "test"):
        write(tmp_path, {f"{split}/{name}/1.png": png(1) for name in names})
    listed: list[str] = []
    whole = Listing.of
    monkeypatch.setattr(Listing, "of", lambda uri, **more: listed.append(uri) or whole(uri, **more))
    split, _ = open_test(str(tmp_path), Preprocessing((3, 8, 8), None, (0.0,) * 3, (1.0,) * 3), classes)
    assert listed == [str(tmp_path)]
    assert split.labels.tolist() == labels


def test_the_training_images_are_no_validation_images_whatever_they_are_called(tmp_path: Path) -> None:
    folder(tmp_path / "a", "train", 30)
    for file in (tmp_path / "a").rglob("*.png"):
        write(tmp_path, {f"copies/{file.parent.name}/copy{file.name}": file.read_bytes()})
    for given in ("a/train", "copies"):
        with refused(DataError, match="other than the training images, got the same"):
            opened(str(tmp_path / "a"), validation_uri=str(tmp_path / given))


def test_what_lies_about_beside_the_images_is_not_used_and_that_is_said(tmp_path: Path) -> None:
    folder(tmp_path, "train", 30)
    write(tmp_path, {"README.txt": b"about"})
    assert not any("not used" in note for note in opened(str(tmp_path)).notes)
    write(
        tmp_path, {"logo.png": png(1), "docs/a.png": png(2), "train/ant/0.raw": b"", "train/labels.csv": b""}
    )
    data = opened(str(tmp_path))
    assert len(data.train) + len(data.validation) == 30
    assert [note for note in data.notes if "not used" in note] == [
        "2 images beside the folders of splits are not used, as docs/a.png",
        "2 files that are not called as images are not used, as train/ant/0.raw",
    ]


def test_a_name_that_is_no_text_is_refused_in_one_line(tmp_path: Path) -> None:
    folder(tmp_path, "train", 6)
    try:
        (tmp_path / "train" / "ant" / os.fsdecode(b"\xff.png")).write_bytes(png(1))
    except OSError:
        pytest.skip("this file system has no such names")
    with refused(DataError, match=f"cannot read .*{tmp_path.name}"):
        opened(str(tmp_path))


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("I", "TIFF"), ("F", "TIFF")])
def test_grey_images_of_more_than_8_bits_count_as_unreadable(tmp_path: Path, mode: str, kind: str) -> None:
    made = io.BytesIO()
    Image.new(mode, (8, 8), 900).save(made, kind)
    folder(tmp_path, "train", 12)
    write(tmp_path, {f"train/ant/deep.{kind.lower()}": made.getvalue()})
    with refused(
        DataError, match=rf"unreadable images, found 1: .*deep\..*more than 8 bits a pixel .*{mode}"
    ):
        opened(str(tmp_path))
    data = opened(str(tmp_path), bad_image_limit=1)
    assert len(data.train) + len(data.validation) == 12
    assert any("1 unreadable images left out" in note and "deep" in note for note in data.notes)


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train", "val", "validation"):
        folder(tmp_path, name, 6)
    with pytest.raises(DataError, match="one folder of validation images, got val, validation"):
        opened(str(tmp_path))


def test_fingerprints_follow_names_and_content(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        folder(tmp_path / name, "train", 30)
    same = write(tmp_path / "c", {"train/ant/0000.png": png(99)})
    lazily = [opened(str(tmp_path / name), memory_limit_bytes=1000).train.fingerprint for name in "ab"]
    assert lazily[0] == lazily[1] != opened(same, memory_limit_bytes=1000).train.fingerprint


def test_images_in_no_class_folder_and_unreadable_ones_are_named(tmp_path: Path) -> None:
    folder(tmp_path, "train", 12)
    write(tmp_path, {"train/ant/broken.png": png(1)[:30]})
    with pytest.raises(DataError, match=r"at most 0 unreadable images, found 1: .*broken\.png"):
        opened(str(tmp_path))
    write(tmp_path, {"val/1.png": png(1)})
    with refused(DataError, match=r"a folder per class .*val/1\.png"):
        opened(str(tmp_path))


@pytest.mark.parametrize("memory_limit", [1, 10**8])
def test_a_file_that_has_gone_counts_as_an_image_that_cannot_be_read(
    tmp_path: Path, memory_limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ImageFiles.read

    def gone(files: ImageFiles, rows: Rows) -> list[Encoded]:
        (tmp_path / "train" / "ant" / "0000.png").unlink(missing_ok=True)  # once it has been listed
        return read(files, rows)

    monkeypatch.setattr(ImageFiles, "read", gone)

    def whole(limit: int) -> None:
        folder(tmp_path, "train", 12)
        data = opened(str(tmp_path), memory_limit_bytes=memory_limit, bad_image_limit=limit)
        for split in (data.train, data.validation):
            split.batch(torch.arange(len(split)), None)

    whole(1)
    with refused(
        DataError,
        match=r"at most 0 unreadable images, found 1: .*0000\.png \(the last: cannot read .*No such file",
    ):
        whole(0)


@pytest.mark.parametrize(
    "error", [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "I/O error")]
)
def test_a_storage_that_fails_is_no_bad_image(
    tmp_path: Path, error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path, "train", 12)
    train = opened(str(tmp_path), memory_limit_bytes=1, bad_image_limit=9).train

    def fails(listing: Listing, name: str) -> bytes:
        raise StorageError(f"cannot read {name}") from error

    monkeypatch.setattr(Listing, "read", fails)
    with pytest.raises(StorageError):
        train.batch(torch.arange(3), None)


def test_test_images_in_no_class_folders_have_no_labels_and_the_validation_images_judge(
    tmp_path: Path,
) -> None:
    folder(tmp_path, "train", 30)
    folder(tmp_path, "val", 6, first=100)
    write(tmp_path, {f"test/T{number}.png": png(number) for number in range(4)})
    data = opened(str(tmp_path))
    assert (len(data.test or []), data.validation_held_out) == (6, True)
    assert "the test images lie in no class folders, so they have no labels and are not used" in data.notes
    preprocessing = Preprocessing((3, 8, 8), None, (0.0,) * 3, (1.0,) * 3)
    split, kind = open_test(str(tmp_path), preprocessing, 3, CLASSES)
    assert (len(split), kind) == (6, "test")
    # the training images decide which classes there are: they are never passed over
    write(tmp_path / "loose", {"train/1.png": png(1), "test/ant/2.png": png(2)})
    for only in ("loose", "test"):
        with refused(DataError, match=r"a folder per class .*found \d in none"):
            opened(str(tmp_path / only))


def test_gray_networks_take_gray_images(tmp_path: Path) -> None:
    write(tmp_path, {f"train/{number % 2}/{number}.png": png(number, mode="L") for number in range(20)})
    data = open_data(str(tmp_path), input_shape=(1, 8, 8), mean=(0.0,), std=(1.0,), resize=None)
    images, labels = data.train.batch(torch.arange(18), None)
    assert images.shape == (18, 1, 8, 8)
    assert [round(float(image.mean()) * 255) % 2 for image in images] == labels.tolist()
