"""Parquet of encoded images, on a local directory and on S3."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import CLASSES, number_of, numbered, parquet, partly_unreadable, png, write
from fsspec.implementations.memory import MemoryFileSystem
from refusals import refused

from clipq_ray import connections
from clipq_ray.connections import Connection
from clipq_ray.data import Data, Preprocessing, Split, batches, open_data, open_test
from clipq_ray.data.encoded import EncodedSplit
from clipq_ray.data.tensors import TensorSplit
from clipq_ray.errors import ConfigError, DataError, StorageError
from clipq_ray.storage import Store
from clipq_ray.work import search_images

pytest_plugins = ["s3_server"]

PLAIN = {"input_shape": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3}


@pytest.fixture
def root(storage_uri: str) -> Store:
    """Three training files of 40, 30 and 50 images and a test file, on both storages."""
    store = Store(storage_uri)
    for name, first, count in (
        ("train-0", 0, 40),
        ("train-1", 40, 30),
        ("train-2", 70, 50),
        ("test-0", 500, 20),
    ):
        store.write(f"data/{name}.parquet", numbered(first, count))
    return store


def numbers(split: Split, indices: torch.Tensor, augment: torch.Generator | None = None) -> list[int]:
    return [number_of(image * 255) for image in split.batch(indices, augment)[0].numpy()]


def opened(uri: str, **options) -> Data:
    return open_data(uri, **{**PLAIN, **options})


def test_images_labels_and_class_names_are_read_from_all_files(root: Store) -> None:
    data = opened(root.uri)
    assert (len(data.train), len(data.validation), data.class_names) == (108, 12, CLASSES)
    assert data.test is not None
    assert numbers(data.test, torch.arange(20)) == list(range(500, 520))
    assert data.test.labels.tolist() == [number % 3 for number in range(500, 520)]
    both = numbers(data.train, torch.arange(108)) + numbers(data.validation, torch.arange(12))
    assert sorted(both) == list(range(120))


def test_beyond_the_memory_limit_the_same_images_come_from_row_groups(root: Store) -> None:
    memory, lazy = opened(root.uri), opened(root.uri, memory_limit_bytes=3000)
    assert isinstance(memory.train, TensorSplit)
    assert isinstance(lazy.train, EncodedSplit)
    for first, second in ((memory.train, lazy.train), (memory.validation, lazy.validation)):
        order = torch.arange(len(first)).flip(0)
        assert torch.equal(first.batch(order, None)[0], second.batch(order, None)[0])
        assert torch.equal(first.batch(order, None)[1], second.batch(order, None)[1])
        augmented = [one.batch(order, torch.Generator().manual_seed(4))[0] for one in (first, second)]
        assert torch.equal(*augmented)


def test_an_epoch_over_more_than_memory_reads_each_row_group_once_and_stays_in_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = write(tmp_path, {"train-0.parquet": numbered(0, 150), "train-1.parquet": numbered(150, 150)})
    data = opened(uri, memory_limit_bytes=20_000, validation_images=30)
    assert isinstance(data.train, EncodedSplit)
    source = data.train.source
    reads: list[int] = []
    whole = source._read_group
    monkeypatch.setattr(source, "_read_group", lambda group: reads.append(group) or whole(group))
    order = data.train.order(torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(270))
    seen = [batch[1] for batch in batches(data.train, order.split(16), lambda _: None)]
    assert torch.cat(seen).tolist() == data.train.labels[order.numpy()].tolist()
    assert sorted(reads) == sorted(set(data.train.source.groups[data.train.rows]))
    assert source._cached_bytes <= source.cache_bytes
    assert len(source._cache) > 1
    assert order.tolist() != data.train.order(torch.Generator().manual_seed(1)).tolist()


def test_validation_images_come_from_few_row_groups(tmp_path: Path) -> None:
    data = opened(
        write(tmp_path, {"train.parquet": numbered(0, 300)}), memory_limit_bytes=1000, validation_images=12
    )
    assert isinstance(data.validation, EncodedSplit)
    assert len(set(data.validation.source.groups[data.validation.rows])) <= 3
    assert np.bincount(data.validation.labels).tolist() == [4, 4, 4]


def test_images_of_the_search_come_from_few_row_groups_in_the_order_of_the_files_or_shuffled(
    tmp_path: Path,
) -> None:
    data = opened(write(tmp_path, {"train.parquet": numbered(0, 300)}), memory_limit_bytes=1000)
    found, shuffled = (search_images(data.train, 24, 0, shuffled=flag) for flag in (False, True))
    assert isinstance(found, EncodedSplit)
    assert isinstance(shuffled, EncodedSplit)
    assert found.groups is not None
    assert len(set(found.groups)) <= 4
    assert np.bincount(found.labels).tolist() == [8, 8, 8]
    assert found.rows.tolist() == sorted(found.rows) == sorted(shuffled.rows) != shuffled.rows.tolist()
    assert len(search_images(data.train, 10**6, 0)) == len(data.train)


def test_fingerprints_follow_content_and_not_the_place(tmp_path: Path) -> None:
    files = {"train.parquet": numbered(0, 40), "test.parquet": numbered(50, 10)}
    for limit in (1000, 10**8):
        first = opened(write(tmp_path / f"a{limit}", files), memory_limit_bytes=limit)
        moved = opened(write(tmp_path / f"b{limit}", files), memory_limit_bytes=limit)
        other = opened(
            write(tmp_path / f"c{limit}", {**files, "train.parquet": numbered(1, 40)}),
            memory_limit_bytes=limit,
        )
        assert first.train.fingerprint == moved.train.fingerprint
        assert first.train.fingerprint != other.train.fingerprint
        assert first.train.fingerprint != first.validation.fingerprint
        assert len(first.train.fingerprint) == 64


def test_a_split_continues_in_another_process(tmp_path: Path) -> None:
    data = opened(write(tmp_path, {"train.parquet": numbered(0, 40)}), memory_limit_bytes=1000)
    data.train.batch(torch.arange(3), None)
    there = pickle.loads(pickle.dumps(data.train))
    assert torch.equal(there.batch(torch.arange(9), None)[0], data.train.batch(torch.arange(9), None)[0])


def test_larger_images_are_resized_and_cropped(tmp_path: Path) -> None:
    images = [png(number, (20 + number, 30)) for number in range(12)]
    uri = write(tmp_path, {"train.parquet": parquet(images, [number % 3 for number in range(12)])})
    data = opened(uri)
    assert data.preprocessing.resize == 9
    assert isinstance(data.train, EncodedSplit)
    for augment in (None, torch.Generator().manual_seed(0)):
        both = numbers(data.train, torch.arange(10), augment) + numbers(
            data.validation, torch.arange(2), augment
        )
        assert sorted(both) == list(range(12))
    assert opened(uri, resize=16).preprocessing.resize == 16


def test_decoded_pixels_do_not_depend_on_threads(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    images = []
    for _ in range(8):  # noise does not compress, so that these images are worth a thread
        from io import BytesIO

        from PIL import Image

        out = BytesIO()
        Image.fromarray(draw.integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(out, "PNG")
        images.append(out.getvalue())
    data = opened(
        write(tmp_path, {"train.parquet": parquet(images, [0, 1] * 4, ())}), input_shape=(3, 32, 32)
    )
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(data.train.batch(torch.arange(6), torch.Generator().manual_seed(1))[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_unreadable_images_are_named_counted_and_limited(tmp_path: Path) -> None:
    images: list[bytes | None] = [png(number) for number in range(30)]
    images[3], images[17], images[20] = b"no image", images[17][:40], None
    uri = write(tmp_path, {"train-0.parquet": parquet(images, [number % 3 for number in range(30)])})
    with refused(DataError, match=r"at most 2 unreadable images, found 3: .*train-0\.parquet:\d+"):
        opened(uri, bad_image_limit=2)
    data = opened(uri, bad_image_limit=3)
    assert len(data.train) + len(data.validation) == 27
    assert any("3 unreadable images" in note and "train-0.parquet:17" in note for note in data.notes)


def test_an_unreadable_image_met_in_a_batch_is_replaced_by_the_next_one_and_its_label(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = partly_unreadable(tmp_path)
    data = opened(uri, memory_limit_bytes=1000, bad_image_limit=2)
    assert data.test is not None
    pixels, labels = data.test.batch(torch.tensor([4, 5, 9]), None)
    assert [number_of(image * 255) for image in pixels.numpy()] == [4, 7, 9]
    assert labels.tolist() == [1, 1, 0]
    assert [name.rpartition("/")[2] for name in data.test.unreadable] == ["test.parquet:5", "test.parquet:6"]
    assert "test.parquet:5" in caplog.text
    strict = opened(uri, memory_limit_bytes=1000)
    assert strict.test is not None
    with pytest.raises(DataError, match="at most 0 unreadable images"):
        strict.test.batch(torch.arange(10), None)


def test_images_of_another_size_than_stated_count_as_unreadable(tmp_path: Path) -> None:
    images = [png(0), png(1, (9, 8)), *[png(number) for number in range(2, 10)]]
    with pytest.raises(
        DataError, match=r"expected 8x8 pixels, got 9x8.*give images of that size, or .* --resize"
    ):
        opened(write(tmp_path, {"train.parquet": parquet(images, [0, 1] * 5, ())}))


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("train.parquet", b"", "damaged or truncated"),
        ("train.parquet", numbered(0, 20)[:-9], "damaged or truncated"),
        ("train.parquet", b"PAR1" + b"\xff" * 40 + (36).to_bytes(4, "little") + b"PAR1", "cannot read"),
        ("train.parquet", parquet([], []), "found no rows"),
        ("train.parquet", parquet([png(0), png(1)], [0, None]), "a label in every row, found 1"),
        ("train.parquet", parquet([png(0)] * 3, [0, 1, 5]), "expected train labels in 0..2, got 0..5"),
        ("train.parquet", parquet([png(0)] * 3, [0, -1, 1], ()), "got -1..1"),
        ("train.parquet", parquet([png(0)] * 3, [0, 10**12, 1], ()), "at most 999,999.*got 0..1000000000000"),
        ("test.parquet", numbered(0, 5), "expected training images .* found only test"),
        ("part-0.parquet", numbered(0, 5), "found only files that name no split"),
        ("train.txt", b"x", "expected Parquet files"),
    ],
)
def test_bad_files_are_refused_in_one_line_that_names_them(
    tmp_path: Path, name: str, data: bytes, expected: str
) -> None:
    with refused(DataError, match=expected):
        opened(write(tmp_path, {name: data}))


def test_other_columns_are_listed(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for columns, expected in (
        ({"img": [b"x"], "label": [1]}, "found no image among img, label"),
        ({"image": [b"x"], "fine_label": [1]}, "found no label among image, fine_label"),
        ({"image": [b"x"], "label": ["ant"]}, "labels of type string"),
        ({"image": ["x.png"], "label": [1]}, "images of type string"),
    ):
        pq.write_table(pa.table(columns), tmp_path / "train.parquet")
        with pytest.raises(DataError, match=expected):
            opened(str(tmp_path))


def test_labels_that_no_signed_number_holds_are_refused_in_one_line(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for most in (2, 2**63):
        labels = pa.array([0, 1, most], pa.uint64())
        pq.write_table(
            pa.table({"image": [png(n) for n in range(3)], "label": labels}), tmp_path / "train.parquet"
        )
        if most == 2:
            assert opened(str(tmp_path), validation_images=1).classes == 3
            continue
        with refused(DataError, match=r"cannot read .*train\.parquet: .*9223372036854775808"):
            opened(str(tmp_path))


def test_a_column_of_bytes_serves_as_well(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"image": [png(n) for n in range(9)], "label": list(range(9))}), tmp_path / "train.parquet"
    )
    data = opened(str(tmp_path), validation_images=3)
    assert not any("nothing to do" in note for note in data.notes)
    assert (len(data.train), data.classes, data.class_names[8]) == (6, 9, "8")


@pytest.mark.parametrize(
    ("first", "second"), [("train-0", "train-1"), ("train", "test"), ("train", "validation"), ("val", "test")]
)
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("ant", "cat", "bee"), ("class 1 is bee in", "class 1 is cat in")),
        ((*CLASSES, "dog"), ("3 classes in", "4 classes in")),
    ],
)
def test_files_that_call_their_classes_differently_are_refused(
    tmp_path: Path, first: str, second: str, names: tuple[str, ...], words: tuple[str, str]
) -> None:
    images, labels = [png(number) for number in range(30)], [number % 3 for number in range(30)]
    files = {"train": numbered(0, 30), "test-0": parquet(images, labels, ())}
    files |= {first: parquet(images, labels, CLASSES), second: parquet(images, labels, names)}
    uri = write(tmp_path, {f"{name}.parquet": data for name, data in files.items()})
    with refused(DataError, match="expected the same class names") as caught:
        opened(uri)
    assert all(word in str(caught.value) for word in (*words, f"{second}.parquet"))


def test_classes_are_called_as_any_of_the_files_says(tmp_path: Path) -> None:
    images, labels = [png(number) for number in range(30)], [number % 3 for number in range(30)]
    silent, named = parquet(images, labels, ()), parquet(images, labels, CLASSES)
    for number, (train, test) in enumerate(((silent, named), (named, silent))):
        uri = write(
            tmp_path / str(number),
            {"train-0.parquet": silent, "train-1.parquet": train, "test.parquet": test},
        )
        assert opened(uri).class_names == CLASSES


def test_class_names_may_stand_by_their_numbers(tmp_path: Path) -> None:
    images, labels = [png(number) for number in range(33)], [number % 11 for number in range(33)]
    names = {str(number): f"class {number}" for number in range(11)}
    for case, (stated, expected) in enumerate(
        (
            (names, tuple(names.values())),
            (dict(sorted(names.items())), tuple(names.values())),  # "10" before "2"
            ({**names, "10": "ten", "12": "more"}, tuple(map(str, range(11)))),  # no one says what 11 is
            ({"a": "b"}, tuple(map(str, range(11)))),
        )
    ):
        uri = write(tmp_path / str(case), {"train.parquet": parquet(images, labels, stated)})
        assert opened(uri).class_names == expected


@pytest.mark.parametrize(
    ("labels", "names", "note"),
    [
        (range(1, 11), (), "class 0 has no training image; are labels numbered from 0?"),
        ((0, 1, 1001), (), "classes 2 to 1000 have no training images; are labels numbered from 0?"),
        ((0, 2, 5), (), "classes 1, 3 to 4 have no training images; are labels numbered from 0?"),
        (
            range(0, 999, 2), (),
            "classes 1, 3, 5, 7 and 495 more have no training images; are labels numbered from 0?",
        ),
        ((0, 2), CLASSES, "class 1 has no training image"),
        (range(3), (), None),
    ],
)  # fmt: skip
def test_classes_without_training_images_are_said(
    tmp_path: Path, labels: Sequence[int], names: tuple[str, ...], note: str | None
) -> None:
    rows = [label for label in labels for _ in range(2)]
    images = [png(number % 200) for number in range(len(rows))]
    data = opened(write(tmp_path, {"train.parquet": parquet(images, rows, names)}))
    assert [one for one in data.notes if "training image" in one and "class" in one] == (
        [note] if note else []
    )


def test_classes_that_a_trial_leaves_out_are_said(tmp_path: Path) -> None:
    labels = [*range(20), *[20 + number % 2 for number in range(180)]]
    uri = write(tmp_path, {"train.parquet": parquet([png(number) for number in range(200)], labels, ())})
    assert not any("no training image" in note for note in opened(uri).notes)
    assert any("have no training images" in note for note in opened(uri, limit_images=20).notes)


def test_which_files_are_the_test_set(tmp_path: Path) -> None:
    files = {"train.parquet": numbered(0, 60)}
    alone = opened(write(tmp_path / "a", files))
    assert (alone.test, alone.validation_held_out) == (None, True)
    assert any("no test data" in note for note in alone.notes)
    for name in ("val.parquet", "validation-00000-of-00001.parquet", "validation/0000.parquet"):
        with_validation = opened(write(tmp_path / name.replace("/", "-"), {**files, name: numbered(100, 9)}))
        assert len(with_validation.test or []) == 9
        assert with_validation.validation_held_out
        assert any("is the test set" in note for note in with_validation.notes)
    both = opened(
        write(tmp_path / "c", {**files, "val.parquet": numbered(100, 9), "test.parquet": numbered(200, 12)})
    )
    assert (len(both.train), len(both.validation), len(both.test or []), both.validation_held_out) == (
        60,
        9,
        12,
        False,
    )
    asked = opened(str(tmp_path / "c"), validation_images=3)
    assert len(asked.validation) == 9
    assert "--validation-images has nothing to do: 9 validation images are there" in asked.notes
    hidden = parquet([png(number) for number in range(5)], [-1] * 5)
    unlabelled = opened(
        write(tmp_path / "d", {**files, "validation.parquet": numbered(100, 9), "test.parquet": hidden})
    )
    assert len(unlabelled.test or []) == 9
    assert any("no labels" in note for note in unlabelled.notes)


def test_the_users_own_validation_data_is_used_and_must_not_be_the_test_set(tmp_path: Path) -> None:
    files = {"train.parquet": numbered(0, 60), "test.parquet": numbered(100, 9)}
    uri = write(tmp_path / "a", files)
    own = write(tmp_path / "own", {"some.parquet": numbered(300, 15)})
    for given in (own, f"{own}/some.parquet"):
        data = opened(uri, validation_uri=given)
        assert (len(data.train), len(data.validation), data.validation_held_out) == (60, 15, False)
    for memory in (10**9, 10**4):  # read by row groups the same images are the same too
        with pytest.raises(DataError, match="other than the test images"):
            opened(uri, validation_uri=uri, memory_limit_bytes=memory)
    copied = write(tmp_path / "copied", {"held.parquet": files["test.parquet"]})
    for memory in (10**9, 10**4):
        with pytest.raises(DataError, match="other than the test images"):
            opened(uri, validation_uri=copied, memory_limit_bytes=memory)
    with pytest.raises(ConfigError, match="got both"):
        opened(uri, validation_uri=own, validation_images=5)
    names = write(tmp_path / "names", {"val.parquet": parquet([png(1)], [0], ("x", "y", "z"))})
    with pytest.raises(DataError, match="classes of the training data"):
        opened(uri, validation_uri=names)


@pytest.mark.parametrize("memory", [10**9, 10**4])
@pytest.mark.parametrize("limit", [None, 30])
def test_the_training_images_are_no_validation_images(tmp_path: Path, memory: int, limit: int | None) -> None:
    uri = write(tmp_path / "a", {"train.parquet": numbered(0, 60)})
    copied = write(tmp_path / "copied", {"some.parquet": numbered(0, 60)})
    options = {"memory_limit_bytes": memory, "limit_images": limit}
    for given in (uri, copied):
        with refused(DataError, match="other than the training images, got the same; a network knows those"):
            opened(uri, validation_uri=given, **options)
    other = write(tmp_path / "other", {"some.parquet": numbered(60, 60)})
    assert len(opened(uri, validation_uri=other, **options).validation) == 60


def test_images_whose_classes_a_network_numbers_otherwise_judge_nothing(tmp_path: Path) -> None:
    uri = write(tmp_path, {"test.parquet": numbered(0, 9)})
    preprocessing = Preprocessing((3, 8, 8), None, (0.0,) * 3, (1.0,) * 3)
    for names in (("bee", "ant", "cat"), ("ant", "cat"), ("wasp", "ant", "bee", "cat")):
        with refused(DataError, match="expected the classes in the order .*, got ant, bee, cat at"):
            open_test(uri, preprocessing, 4, names)
    for known in ((), ("ant", "bee"), ("ant", "wasp", "cat"), (*CLASSES, "dog")):
        split, _ = open_test(uri, preprocessing, 4, known)
        assert split.labels.tolist() == [0, 1, 2] * 3


def test_files_that_name_no_split_beside_others_are_not_used_and_that_is_said(tmp_path: Path) -> None:
    files = {"train.parquet": numbered(0, 60), "test.parquet": numbered(100, 9)}
    more = {"extra-0.parquet": numbered(200, 9), "extra-1.parquet": numbered(300, 9)}
    assert not any("not used" in note for note in opened(write(tmp_path / "a", files)).notes)
    data = opened(write(tmp_path / "b", {**files, **more}))
    assert len(data.train) + len(data.validation) == 60
    (note,) = [note for note in data.notes if "not used" in note]
    assert note == "2 Parquet files whose names name no split are not used, as extra-0.parquet"


def test_images_of_another_kind_beside_parquet_files_are_not_used_and_that_is_said(tmp_path: Path) -> None:
    files = {"train.parquet": numbered(0, 60), "train/ant/0.png": b"", "raw/train-images-idx3-ubyte.gz": b""}
    data = opened(write(tmp_path, {**files, "train/bee/1.JPG": b"", "README.md": b""}))
    assert len(data.train) + len(data.validation) == 60
    assert [note for note in data.notes if "not used" in note] == [
        "files of another kind beside the Parquet files are not used: 1 idx files, as raw/train-images-idx3-ubyte.gz",
        "files of another kind beside the Parquet files are not used: 2 image files, as train/ant/0.png",
    ]


def test_a_limit_takes_a_fixed_stratified_sample_of_the_training_images(tmp_path: Path) -> None:
    uri = write(tmp_path, {"train.parquet": numbered(0, 120), "test.parquet": numbered(300, 10)})
    first, second = (opened(uri, limit_images=30, seed=seed) for seed in (1, 2))
    used = [
        set(numbers(one.train, torch.arange(27)) + numbers(one.validation, torch.arange(3)))
        for one in (first, second)
    ]
    assert len(used[0]) == 30
    assert used[0] == used[1]
    assert (len(first.test or []), "trial: 30 of 120 training images" in first.notes) == (10, True)
    assert len(opened(uri, limit_images=500).train) == 108
    with pytest.raises(ConfigError, match="at least 2"):
        opened(uri, limit_images=1)


def test_the_given_cifar10_opens_lazily_with_its_class_names(shared: Path) -> None:
    data = open_data(str(shared / "data" / "cifar10"), input_shape=(3, 32, 32), memory_limit_bytes=10**7)
    assert (len(data.train), len(data.validation), len(data.test or [])) == (45_000, 5_000, 10_000)
    assert data.class_names[:2] == ("airplane", "automobile")
    images, labels = data.train.batch(data.train.order(torch.Generator().manual_seed(0))[:64], None)
    assert images.shape == (64, 3, 32, 32)
    assert len(labels.unique()) > 5


class Away(MemoryFileSystem):
    """A store that does not answer a number of requests for files of Parquet."""

    failures = 0

    def _open(self, path: str, *given: Any, **more: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise ConnectionResetError(errno.ECONNRESET, "reset by the store")
        return super()._open(path, *given, **more)

    def isfile(self, path: str) -> bool:
        return not self.failures and bool(super().isfile(path))  # as fsspec's, to which a failure is a no


def test_row_groups_of_a_store_that_is_away_are_waited_for_and_are_no_mistake_in_the_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    away = Away(skip_instance_cache=True)
    monkeypatch.setattr(Connection, "open", lambda _: away)
    monkeypatch.setattr(connections, "delays", lambda limit: iter([0.0, 0.0]))
    Store("memory://away").write("train-0.parquet", numbered(0, 40))
    Store("memory://away").write("test-0.parquet", numbered(500, 20))
    Store("memory://away").read("train-0.parquet")  # it has answered
    away.failures = 2
    train = opened("memory://away", memory_limit_bytes=3000, validation_images=2).train
    away.failures = 2
    assert len(numbers(train, torch.arange(3))) == 3
    away.failures = 9
    again = pickle.loads(pickle.dumps(train))  # with no row group kept
    with refused(StorageError, match=r"cannot read memory://away/train-0\.parquet: "):
        again.batch(torch.arange(3), None)
