"""Data sets by name, and idx files."""

from __future__ import annotations

import gzip
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused
from torchvision import datasets

from clipq_ray.data import open_data, open_test
from clipq_ray.data.preprocessing import Preprocessing
from clipq_ray.data.resident import ResidentSplit
from clipq_ray.data.tensors import TensorSplit
from clipq_ray.errors import ConfigError, DataError


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, packed: bool = False, size: int = 28, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    for split, count in (("train", 40), ("t10k", 20)):
        pixels = draw.integers(0, 256, (count, size, size), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in ((f"{split}-images-idx3-ubyte", pixels), (f"{split}-labels-idx1-ubyte", labels)):
            data = gzip.compress(idx(array), mtime=0) if packed else idx(array)
            (folder / (name + (".gz" if packed else ""))).write_bytes(data)


def test_digits_are_1797_images_with_a_fixed_stratified_test_set() -> None:
    data = open_data("digits", input_shape=(1, 28, 28), seed=1)
    assert data.test is not None
    assert len(data.test) == 360
    assert len(data.train) + len(data.validation) == 1437
    assert (data.classes, data.class_names[3], data.validation_held_out) == (10, "3", True)
    assert min(np.bincount(data.test.labels)) >= 34
    other = open_data("digits", input_shape=(1, 28, 28), seed=2)
    assert other.test is not None
    assert other.test.fingerprint == data.test.fingerprint
    assert other.train.fingerprint != data.train.fingerprint
    images, labels = data.train.batch(torch.arange(8), torch.Generator().manual_seed(0))
    assert images.shape == (8, 1, 28, 28)
    assert labels.tolist() == data.train.labels[:8].tolist()


def test_a_fingerprint_is_the_same_in_another_process() -> None:
    code = "from clipq_ray.data import open_data; print(open_data('digits', input_shape=(1, 28, 28)).train.fingerprint)"
    root = Path(__file__).resolve().parents[2]
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert there.stdout.strip() == open_data("digits", input_shape=(1, 28, 28)).train.fingerprint


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_of_idx_files_opens_packed_or_not(tmp_path: Path, packed: bool) -> None:
    write_mnist(tmp_path / "m", packed)
    data = open_data(str(tmp_path / "m"), input_shape=(1, 28, 28))
    named = open_data(f"mnist:{tmp_path / 'm'}", input_shape=(1, 28, 28))
    assert (len(data.train), len(data.validation), len(data.test or [])) == (36, 4, 20)
    assert named.train.fingerprint == data.train.fingerprint


def test_images_beside_idx_files_are_not_used_and_that_is_said_whatever_they_are_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_mnist(tmp_path)
    assert not any("not used" in note for note in open_data(str(tmp_path), input_shape=(1, 28, 28)).notes)
    (tmp_path / "train" / "7").mkdir(parents=True)
    (tmp_path / "train" / "7" / "0.png").write_bytes(b"")
    note = "files of another kind beside the idx files are not used: 1 image files, as train/7/0.png"
    assert note in open_data(str(tmp_path), input_shape=(1, 28, 28)).notes
    assert note in open_data("digits", input_shape=(1, 28, 28), validation_uri=str(tmp_path)).notes
    assert note not in caplog.text
    open_test(str(tmp_path), Preprocessing((1, 28, 28), None, (0.0,), (1.0,)), 10)
    assert note in caplog.text


def test_torchvisions_own_mnist_folder_opens_by_name(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw")
    data = open_data("mnist", input_shape=(1, 28, 28), data_root=str(tmp_path / "MNIST" / ".."))
    again = open_data(str(tmp_path / "MNIST" / "raw"), input_shape=(1, 28, 28))
    assert data.train.fingerprint == again.train.fingerprint


@pytest.mark.parametrize("packed", [False, True])
def test_sets_whose_files_are_called_alike_are_told_apart_by_their_folders(
    tmp_path: Path, packed: bool
) -> None:
    folders = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw", "other": "KMNIST/raw"}
    for seed, folder in enumerate(folders.values()):
        write_mnist(tmp_path / folder, packed, seed=seed)
    for name in ("mnist", "fashion_mnist"):
        wanted = open_data(str(tmp_path / folders[name]), input_shape=(1, 28, 28)).train.fingerprint
        assert open_data(f"{name}:{tmp_path}", input_shape=(1, 28, 28)).train.fingerprint == wanted
        # files that lie about in the root are of one set only, of which no one knows
        write_mnist(tmp_path / "loose" / folders[name], packed, seed=list(folders).index(name))
        write_mnist(tmp_path / "loose", packed, seed=9)
        named = open_data(name, input_shape=(1, 28, 28), data_root=str(tmp_path / "loose"))
        assert named.train.fingerprint == wanted
    with refused(
        DataError,
        match=r"train-images-idx3-ubyte in one folder, got FashionMNIST/raw/train.*KMNIST/raw/.*MNIST/raw/",
    ):
        open_data(str(tmp_path), input_shape=(1, 28, 28))


@pytest.mark.parametrize(("name", "other"), [("mnist", "FashionMNIST"), ("fashion_mnist", "MNIST")])
def test_a_name_never_gives_the_other_set(tmp_path: Path, name: str, other: str) -> None:
    write_mnist(tmp_path / other / "raw")
    with refused(DataError, match=f"expected the files of {name}"):
        open_data(name, input_shape=(1, 28, 28), data_root=str(tmp_path))


def test_labels_are_those_beside_their_images(tmp_path: Path) -> None:
    write_mnist(tmp_path / "a")
    (tmp_path / "b").mkdir()
    labels = tmp_path / "a" / "train-labels-idx1-ubyte"
    moved = labels.rename(tmp_path / "b" / labels.name)
    with refused(DataError, match=r"train-labels-idx1-ubyte beside .*/a/train-images-idx3-ubyte"):
        open_data(str(tmp_path), input_shape=(1, 28, 28))
    labels.write_bytes(moved.read_bytes())
    with refused(DataError, match="train-labels-idx1-ubyte in one folder, got a/train.*b/train"):
        open_data(str(tmp_path), input_shape=(1, 28, 28))


def test_packed_files_may_lie_beside_the_plain_ones(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw")
    plain = open_data(str(tmp_path), input_shape=(1, 28, 28)).train.fingerprint
    write_mnist(tmp_path / "MNIST" / "raw", packed=True)
    for uri in (str(tmp_path), f"mnist:{tmp_path}", f"mnist:{tmp_path}/MNIST/raw"):
        assert open_data(uri, input_shape=(1, 28, 28)).train.fingerprint == plain


def test_torchvisions_cifar10_opens_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    batch = {"data": pixels, "labels": [number % 10 for number in range(20)]}
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for name in names:
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    # The real files' checksums guard torchvision's pickles; these files are our own.
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, None] for name in names[:5]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [[names[5], None]])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None}
    )
    data = open_data(f"cifar10:{tmp_path}", input_shape=(3, 32, 32), mean=(0.0,) * 3, std=(1.0,) * 3)
    assert (len(data.train), len(data.validation), data.class_names[:2]) == (90, 10, ("a", "b"))
    assert data.test is not None
    images, _ = data.test.batch(torch.arange(20), None)
    assert np.array_equal((images.numpy() * 255).round().reshape(20, -1), pixels)


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 32, 32), (3, 32, 32), (3, 20, 20)])
def test_gray_images_fit_networks_of_other_sizes_and_channels(
    tmp_path: Path, shape: tuple[int, int, int]
) -> None:
    write_mnist(tmp_path / "m")
    data = open_data(str(tmp_path / "m"), input_shape=shape)
    for augment in (None, torch.Generator().manual_seed(0)):
        images, _ = data.train.batch(torch.arange(5), augment)
        assert tuple(images.shape) == (5, *shape)
        assert images.is_contiguous()


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 28, 28), (3, 20, 20)])
def test_digits_are_not_mirrored_for_networks_of_three_channels_either(
    tmp_path: Path, shape: tuple[int, int, int]
) -> None:
    write_mnist(tmp_path / "m")
    train = open_data(
        str(tmp_path / "m"), input_shape=shape, mean=(0.0,) * shape[0], std=(1.0,) * shape[0]
    ).train
    assert isinstance(train, TensorSplit)
    train.images = np.zeros_like(train.images)
    train.images[..., : train.images.shape[-1] // 2] = 255  # bright on the left
    for device in (train, *([ResidentSplit(train, torch.device("cpu"))] if shape[1] == 28 else [])):
        images = device.batch(torch.arange(30), torch.Generator().manual_seed(0))[0]
        left, right = images.chunk(2, dim=-1)
        assert (left.mean((1, 2, 3)) >= right.mean((1, 2, 3))).all()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda data: data[:-1], "expected 31360 values"),
        (lambda data: b"\0\0\x0d\x03" + data[4:], "unsigned bytes"),
        (lambda data: data[:3], "idx file"),
        (lambda data: gzip.compress(data)[:-20], "cannot unpack"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path: Path, damage, expected: str) -> None:
    write_mnist(tmp_path / "m")
    path = tmp_path / "m" / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with refused(DataError, match=expected) as caught:
        open_data(str(tmp_path / "m"), input_shape=(1, 28, 28))
    assert "train-images-idx3-ubyte" in str(caught.value)


def test_missing_labels_and_unequal_counts_are_named(tmp_path: Path) -> None:
    write_mnist(tmp_path / "m")
    labels = tmp_path / "m" / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros(39, dtype=np.uint8)))
    with pytest.raises(DataError, match="a label for each of 40 images, got 39"):
        open_data(str(tmp_path / "m"), input_shape=(1, 28, 28))
    labels.write_bytes(idx(np.zeros(0, dtype=np.uint8)))
    images = tmp_path / "m" / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    images.write_bytes(idx(np.zeros((0, 28, 28), dtype=np.uint8)))
    with pytest.raises(DataError, match="expected train images"):
        open_data(str(tmp_path / "m"), input_shape=(1, 28, 28))
    images.write_bytes(whole)
    labels.unlink()
    with pytest.raises(DataError, match="train-labels-idx1-ubyte beside"):
        open_data(str(tmp_path / "m"), input_shape=(1, 28, 28))


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("cifra10", "did you mean cifar10"),
        ("nothing-like-it", "did you mean digits or mnist"),
        ("/no/such/folder", "found no files there"),
        ("cifar10:/no/such/folder", "expected the files of cifar10 under /no/such/folder"),
        ("mnist:/no/such/folder", "expected the files of mnist"),
    ],
)
def test_unknown_and_missing_data_say_what_was_looked_for(uri: str, expected: str) -> None:
    with refused(DataError, match=expected):
        open_data(uri, input_shape=(3, 32, 32))


def test_a_name_that_is_a_folder_here_too_means_the_set_of_that_name_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    note = "digits is the data set of that name; for the folder here say ./digits"
    assert note not in open_data("digits", input_shape=(1, 28, 28)).notes
    write_mnist(tmp_path / "digits")
    write_mnist(tmp_path / "mnist")
    data = open_data("digits", input_shape=(1, 28, 28))
    assert (len(data.train) + len(data.validation), note in data.notes) == (1437, True)
    with refused(DataError, match=r"expected the files of mnist .* for the folder here say \./mnist$"):
        open_data("mnist", input_shape=(1, 28, 28))
    for uri in ("./mnist", "./digits"):
        data = open_data(uri, input_shape=(1, 28, 28))
        assert len(data.train) + len(data.validation) == 40
        assert not any("say ./" in note for note in data.notes)


@pytest.mark.parametrize(
    ("uri", "root"),
    [("cifar10:s3://bucket/c", "data"), ("cifar10", "s3://bucket/c"), ("mnist:s3://bucket/c", "data")],
)
def test_torchvisions_sets_on_object_storage_are_refused_with_what_works_there(uri: str, root: str) -> None:
    with refused(
        DataError, match=r"expected a folder on this machine .*, got s3://bucket/c; copy them here, or"
    ):
        open_data(uri, input_shape=(3, 32, 32), data_root=root)


@pytest.mark.parametrize("pixels", [0, 2])
def test_training_images_are_shifted_by_so_many_pixels_at_most(pixels: int) -> None:
    data = open_data("digits", input_shape=(1, 28, 28), shift_pixels=pixels)
    rows = torch.arange(40)
    plain, shifted = (data.train.batch(rows, seed)[0] for seed in (None, torch.Generator().manual_seed(3)))
    black = plain.min()
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2), value=float(black))
    moved = set()
    for image, wanted in zip(shifted, padded, strict=True):
        places = [
            (down, right)
            for down in range(5)
            for right in range(5)
            if torch.equal(image, wanted[:, down : down + 28, right : right + 28])
        ]
        assert places
        moved.add(places[0])
    assert (len(moved) > 1) is (pixels > 0)
    assert torch.equal(data.validation.batch(rows, None)[0], open_data("digits", input_shape=(1, 28, 28)).validation.batch(rows, None)[0])  # fmt: skip


def test_a_shift_of_images_that_are_cropped_at_random_is_refused() -> None:
    with pytest.raises(ConfigError, match="--shift-pixels"):
        open_data("digits", input_shape=(1, 28, 28), shift_pixels=2, resize=32)


@pytest.mark.parametrize("name", ["", "mnist:"])
def test_the_given_mnist_opens(shared: Path, name: str) -> None:
    data = open_data(f"{name}{shared / 'data' / 'mnist'}", input_shape=(1, 28, 28))
    assert (len(data.train), len(data.validation), len(data.test or []), data.classes) == (
        55_000,
        5_000,
        10_000,
        10,
    )
