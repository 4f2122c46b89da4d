"""The report says what the run measured, loads nothing, and trusts no name."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import example_run as example
import pyarrow as pa
import pytest
from refusals import refused

from clipq_ray import tables
from clipq_ray.errors import ConfigError, FormatError
from clipq_ray.report import missing, render

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Elements that are closed in order, all attributes, all text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without its beginning"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\N{NO-BREAK SPACE}", " ") if "style" not in self.open else ""

    def of(self, key: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == key]


@pytest.fixture(scope="module")
def layers() -> pa.Table:
    return example.layers(5)


@pytest.fixture(scope="module")
def html(layers: pa.Table) -> str:
    return render(example.manifest(layers), layers, example.trials(layers, 6), example.predictions())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def small(manifest: dict[str, Any], count: int = 2, **replaced: Any) -> str:
    """A page of few charts, with parts replaced."""
    layers = example.layers(count)
    empty = tables.TRIALS.empty_table()
    return Page(
        render(
            manifest,
            replaced.get("layers", layers),
            replaced.get("trials", empty),
            replaced.get("predictions"),
        )
    ).text


def test_every_element_is_closed_where_it_should_be(page: Page) -> None:
    assert page.open == []
    assert {"html", "head", "body", "main", "svg", "table"} <= set(page.tags)


def test_the_page_refers_to_nothing_outside_itself(html: str, page: Page) -> None:
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
    ids = set(page.of("id"))
    for value in page.of("href"):
        assert value.startswith("#")
        assert value[1:] in ids
    assert not page.of("src")
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert all(found.strip("'\" ").startswith("#") for found in re.findall(r"url\(([^)]*)\)", html))


def test_ids_are_unique(page: Page) -> None:
    assert len(page.of("id")) == len(set(page.of("id")))


def test_the_same_run_gives_the_same_bytes(html: str) -> None:
    layers = example.layers(5)
    again = render(example.manifest(layers), layers, example.trials(layers, 6), example.predictions())
    assert again == html


def test_the_readers_own_matplotlib_settings_change_nothing() -> None:
    import matplotlib as mpl

    layers = example.layers(2)
    arguments = (example.manifest(layers), layers, tables.TRIALS.empty_table())
    before = render(*arguments)
    with mpl.rc_context({"font.size": 30, "axes.grid": False, "svg.fonttype": "path", "text.color": "red"}):
        assert render(*arguments) == before
        assert mpl.rcParams["font.size"] == 30


def test_the_headline_numbers_stand_on_the_page(page: Page, layers: pa.Table) -> None:
    metrics = example.manifest(layers)["metrics"]
    assert f"{metrics['bytes_before']:,} bytes" in page.text
    assert f"{metrics['bytes_after']:,} bytes" in page.text
    assert f"{metrics['ratio']:.1f}x" in page.text
    assert "91.16 %" in page.text  # compressed
    assert "90.61 to 91.71 %" in page.text  # its interval
    assert "0.26 points" in page.text
    assert "drop against the control" in page.text
    assert "n = 2,000" in page.text


def test_it_says_whether_the_intervals_overlap() -> None:
    layers = example.layers(2)

    def verdict(compressed: float) -> str:
        test = {
            "n": 9,
            "original": example.scores(91.0, 0.5),
            "control": None,
            "compressed": example.scores(compressed, 0.5),
        }
        return small(example.manifest(layers, test=test, reference="original", drop_points=91.0 - compressed))

    assert "The two 95 % intervals overlap." in verdict(90.1)
    assert "The two 95 % intervals do not overlap." in verdict(89.9)
    assert "do not overlap" in verdict(92.1)
    assert "gains 1.10 percentage points against the original network" in verdict(92.1)


def test_every_layer_has_a_bar_and_a_row(page: Page, layers: pa.Table) -> None:
    for row in layers.to_pylist():
        assert page.text.count(row["layer"].removesuffix(".weight")) >= 3  # bar, search, table
        assert f"{row['bytes']:,}" in page.text
        assert f"{row['p']:.4f}" in page.text


def test_bytes_of_the_parts_add_up_to_the_file(page: Page, layers: pa.Table) -> None:
    after = sum(layers["bytes"].to_pylist())
    assert f"5 compressed layers{sum(layers['bytes_before'].to_pylist()):,}{after:,}" in page.text
    assert "all else: biases, batch norm, header7,1123,613" in page.text


def test_sizes_far_apart_get_a_logarithmic_axis() -> None:
    near = example.layers(3)
    assert "The axis is linear" in small(example.manifest(near), layers=near)
    rows = near.to_pylist()
    rows[1]["bytes"] = 1000 * rows[0]["bytes"]
    far = pa.Table.from_pylist(rows, schema=tables.LAYERS)
    assert "The axis is logarithmic" in small(example.manifest(far), layers=far)


def test_lost_and_won_images_are_counted() -> None:
    layers = example.layers(2)
    predictions = pa.Table.from_pydict(
        {
            "index": range(6), "label": [0, 0, 0, 1, 1, 1], "original": [0, 0, 0, 1, 0, 0], "control": [None] * 6,
            "compressed": [0, 0, 1, 1, 1, 2],
        },
        schema=tables.PREDICTIONS,
    )  # fmt: skip
    text = small(example.manifest(layers), predictions=predictions)
    # same 3 of 6; both right 3, lost 1, won 1, both wrong 1
    assert re.search(r"original\s*50\.00 %\s*3\s*1\s*1\s*1\s", text)
    assert "There are no predictions of a control." in text
    kinds = [
        text.index(f"{name}3{before}{after}")
        for name, before, after in (("kind 0", "100.00 %", "66.67 %"), ("kind 1", "33.33 %", "66.67 %"))
    ]
    assert kinds == sorted(kinds)  # the largest drop first


def test_many_classes_are_cut_to_the_ends_and_it_says_so() -> None:
    layers = example.layers(2)
    text = small(example.manifest(layers), predictions=example.predictions(1000, 100))
    assert "25 classes with the largest drop and the 10 with the smallest, of 100" in text
    assert "class 57" in text or "class 99" in text  # names for 10 of the 100 classes only


def test_many_searched_layers_are_cut_to_the_largest_and_it_says_so() -> None:
    layers = example.layers(26)
    html = render(example.manifest(layers), layers, example.trials(layers, 2), None)
    assert "Shown are the 24 layers with the most weights, of 26" in html
    charts = re.findall(r'aria-label="Search of ([^:"]+):', html)
    weights = {row["layer"]: row["weights"] for row in layers.to_pylist()}
    assert len(charts) == 24
    assert min(weights[name] for name in charts) >= max(
        weight for name, weight in weights.items() if name not in charts
    )


def test_what_is_missing_is_said_in_words() -> None:
    layers = example.layers(2)
    bare = example.manifest(layers, test=None, validation=None, drop_points=None)
    for key in (
        "curves",
        "files",
        "notes",
        "config",
        "versions",
        "stages",
        "data",
        "architecture",
        "created_utc",
    ):
        del bare[key]
    text = small(bare)
    for sentence in (
        "Accuracy was not measured",
        "No test images",
        "No validation images",
        "No search",
        "No fine-tuning",
        "No dense control was trained",
        "No predictions",
        "The manifest records none",
        "The run left no notes",
        "stand in manifest.json, which is written after this page",
    ):
        assert sentence in text


def test_without_a_test_set_the_validation_images_are_the_headline() -> None:
    layers = example.layers(2)
    text = small(example.manifest(layers, test=None))
    assert "top-1 accuracy, compressed (validation)" in text
    assert "No test images" in text


def test_a_number_that_was_not_measured_is_called_so() -> None:
    layers = example.layers(2)
    manifest = example.manifest(layers)
    manifest["metrics"]["test"]["compressed"]["loss"] = float("nan")
    manifest["curves"] = {
        "finetune": [{"epoch": 0, "loss": 1.0, "validation_top1_percent": None, "seconds": None}]
    }
    text = small(manifest)
    assert "not measured" in text
    assert "The validation top-1 per epoch was not measured." in text


def test_epochs_of_levels_stand_behind_those_of_the_weights() -> None:
    manifest = example.manifest(example.layers(2))

    def rows(n: int) -> list[dict[str, Any]]:
        return [
            {"epoch": 1 + one, "loss": 1.0 / (1 + one), "validation_top1_percent": 90.0, "seconds": 1.0}
            for one in range(n)
        ]

    manifest["curves"] = {"finetune": rows(3), "levels": rows(2), "control": []}
    text = small(manifest)
    assert "Compressed: 3 epochs" in text
    assert "its levels: 2 epochs" in text
    manifest["curves"]["levels"] = []
    assert "its levels" not in small(manifest)


def test_hostile_names_are_text() -> None:
    evil = '<script>alert("$x_1$")</script><img src=x onerror=y>'
    table = example.layers(2)
    rows = table.to_pylist()
    rows[0]["layer"] = rows[0]["coder"] = evil
    rows[1]["layer"] = '"/></svg><svg onload="x" id="\n\x00#010101'
    layers = pa.Table.from_pylist(rows, schema=tables.LAYERS)
    manifest = example.manifest(layers)
    manifest |= {
        "model": evil,
        "run": evil,
        "notes": [evil],
        "config": {evil: evil},
        "versions": {evil: [evil]},
        "created_utc": evil,
    }
    manifest["data"]["class_names"] = [evil] * 10
    manifest["metrics"]["batch_norm"] = evil
    manifest["stages"][0] |= {"stage": evil, "key": evil}
    manifest["files"] = {evil: {"bytes": 1, "sha256": evil}}
    page = Page(render(manifest, layers, example.trials(layers, 3), example.predictions()))
    assert page.open == []
    assert not {"script", "img"} & set(page.tags)
    assert not page.of("onload")
    assert evil in page.text
    assert "#010101" in page.text  # a name is not taken for a placeholder colour


def test_a_page_of_121_layers_and_1000_classes_can_be_made() -> None:
    layers = example.layers(121)
    page = Page(
        render(example.manifest(layers), layers, example.trials(layers, 2), example.predictions(3000, 1000))
    )
    bars = next(tag for tag in page.attributes if tag[1] == "aria-label" and "121 layers" in tag[2])
    heights = [float(value) for tag, key, value in page.attributes if tag == "svg" and key == "height"]
    assert bars
    assert max(heights) > 121 * 14  # rows stay as high as their text


def test_rounds_that_led_to_the_file_are_named_and_one_alone_is_not() -> None:
    manifest = example.manifest(example.layers(2))
    one = {
        "requested_bytes": 9000, "predicted_bytes": 9100, "bytes": 8950, "drop_points": 0.25, "drop_low_points": -0.5, "drop_high_points": 1.0,
        "epochs": 8, "kept_scale": 1.0,
    }  # fmt: skip
    promise = {
        "intent": "bytes", "value": 5000.0, "words": "at most 5,000 bytes", "kept": True, "reference": "original", "validation_images": 100,
        "confidence_percent": 95, "drop_points": 0.25, "drop_low_points": -0.5, "drop_high_points": 1.0, "bytes": 4990, "predicted_bytes": 5000,
    }  # fmt: skip
    last = {**one, "requested_bytes": 5000, "bytes": 4990, "epochs": 1016}
    text = small({**manifest, "promise": {**promise, "round": 2, "rounds": [one, last]}})
    assert "The file is that of round 2" in text
    for words in ("epochs by then", "8,950", "4,990", "1,016", "+0.25"):
        assert words in text
    assert "epochs by then" not in small({**manifest, "promise": {**promise, "round": 1, "rounds": [last]}})
    assert "epochs by then" not in small(manifest)


def test_one_epoch_is_a_curve_too() -> None:
    layers = example.layers(2)
    manifest = example.manifest(layers)
    manifest["curves"] = {"finetune": manifest["curves"]["finetune"][:1], "control": []}
    assert "Compressed: 1 epoch, 1 min 01 s." in small(manifest)


def test_a_manifest_without_sizes_is_refused_in_one_line() -> None:
    layers = example.layers(2)
    manifest = example.manifest(layers)
    del manifest["metrics"]["bytes_after"]
    with refused(FormatError, match=r"metrics\.bytes_after"):
        small(manifest)


def test_a_table_without_a_column_is_refused() -> None:
    layers = example.layers(2)
    with pytest.raises(FormatError, match=r"layers\.ratio"):
        small(example.manifest(layers), layers=layers.drop_columns(["ratio"]))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing() == []
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert missing() == ["jinja2"]
    with pytest.raises(ConfigError, match=r"install clipq_ray\[report\]"):
        small(example.manifest())


def test_importing_the_report_imports_neither_matplotlib_nor_jinja2() -> None:
    code = "import sys, clipq_ray.report; print([m for m in ('matplotlib', 'jinja2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_of_an_earlier_version_without_groups_and_bounds_is_shown() -> None:
    layers = example.layers(3)
    trials = example.trials(layers).drop_columns(["bound"])
    page = render(example.manifest(layers), layers.drop_columns(["group"]), trials)
    assert "3 layers on 2,000 training images" in page


def test_bounds_and_groups_are_told() -> None:
    layers = example.layers(3)
    names = pa.array(["all"] * 3)
    layers = layers.set_column(layers.schema.get_field_index("group"), layers.schema.field("group"), names)
    trials = example.trials(example.layers(1))
    column = trials.schema.get_field_index("layer")
    trials = trials.set_column(column, trials.schema.field("layer"), pa.array(["all"] * len(trials)))
    bounds = pa.array([number == 3 for number in range(len(trials))])
    trials = trials.set_column(trials.schema.get_field_index("bound"), trials.schema.field("bound"), bounds)
    page = render(example.manifest(layers), layers, trials)
    assert "28 evaluations of 1 group of layers" in page
    assert "1 of them ended early because they could not win" in page
