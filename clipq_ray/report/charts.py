"""The report's figures: each takes plain numbers and returns inline SVG.

Colours mean the same everywhere: the original network, the dense control, the compressed network. Axes carry units. Charts
that grow with the number of layers or classes grow in height, not in density. Not covered: what surrounds a chart (captions, the sentence
where there is nothing to draw), which is `page`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from clipq_ray.report import svg, words

Row = dict[str, Any]

_ROW = 18.0  # height of one layer or class in px, enough for 11 px text
# A hollow marker of the original network.
_RIM: Row = {"markeredgecolor": svg.ORIGINAL, "markeredgewidth": 1.6}


def _axis_size(value: float, _: object) -> str:
    """Bytes as an axis writes them: `4 KB`, `2.5 MB`."""
    for unit, scale in (("MB", 1e6), ("KB", 1e3)):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g} B" if value else "0"


_BYTES = FuncFormatter(_axis_size)


class Top1(NamedTuple):
    """One network's accuracy in percent with its 95 % interval."""

    name: str
    colour: str
    top1: float
    low: float
    high: float


class Series(NamedTuple):
    """One line of a curve: a value, or None where it was not measured, per epoch."""

    name: str
    colour: str
    dashed: bool
    epochs: Sequence[int]
    values: Sequence[float | None]


def _draw(
    size: tuple[float, float], name: str, description: str, draw: Callable[[Figure, Axes], None]
) -> Markup:
    """A figure of `size` px with one pair of axes, filled by `draw`."""
    with svg.style():
        figure = svg.canvas(*size)
        axes = figure.add_subplot()
        draw(figure, axes)
        return svg.inline(figure, name, description)


def _ticks(most: int, whole: bool = False) -> MaxNLocator:
    """At most `most` intervals, at round numbers."""
    return MaxNLocator(most, integer=whole, steps=[1, 2, 5, 10] if whole else [1, 2, 2.5, 5, 10])


def _margins(figure: Figure, left: float, right: float, top: float, bottom: float) -> None:
    """Margins around the axes in px."""
    width, height = figure.get_size_inches() * 72
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)


def _rows(axes: Axes, labels: Sequence[str], family: str | None = None) -> None:
    """One labelled row per item, the first on top, without lines between."""
    axes.set_yticks(range(len(labels)), labels=list(labels), color=svg.INK, family=family)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _beside(axes: Axes, place: float, right: float, text: str, colour: str = svg.INK) -> None:
    """A cell beside the axes: its right end `right` px from them, in row `place` (-1: the head)."""
    head = place < 0
    axes.annotate(
        text,
        (1.0, 1.0 if head else place),
        (right, 11.0 if head else 0.0),
        "axes fraction" if head else ("axes fraction", "data"),
        "offset points",
        ha="right",
        va="center",
        color=svg.MUTED if head else colour,
        fontsize=10.5,
    )


def accuracy(name: str, rows: Sequence[Top1]) -> Markup:
    """Top-1 accuracy with 95 % intervals, a row per network."""

    def draw(figure: Figure, axes: Axes) -> None:
        _margins(figure, 84, 84, 8, 40)
        for index, row in enumerate(rows):
            axes.plot([row.low, row.high], [index, index], color=row.colour, linewidth=2)
            axes.plot(row.top1, index, "o", color=row.colour, markersize=7)
            _beside(axes, index, 60, words.percent(row.top1))
        _rows(axes, [row.name for row in rows])
        axes.margins(x=0.06)
        axes.xaxis.set_major_locator(_ticks(5))
        axes.set_xlabel("top-1 accuracy, %")

    told = "; ".join(
        f"{row.name} {words.percent(row.top1)} ({words.interval(row.low, row.high)})" for row in rows
    )
    return _draw((460, 62 + 30 * len(rows)), name, f"Top-1 accuracy: {told}", draw)


def layer_bars(layers: Sequence[Row], logarithmic: bool) -> Markup:
    """Bytes in the file per layer, with p, b and the ratio beside each bar; a row per layer, in the network's order."""
    names = [words.printable(row["layer"].removesuffix(".weight"), 44) for row in layers]
    sizes = [max(1, row["bytes"]) for row in layers]
    left = 16 + 6.7 * max(map(len, names))

    def draw(figure: Figure, axes: Axes) -> None:
        _margins(figure, left, 216, 24, 22)
        axes.barh(range(len(sizes)), sizes, height=0.66, color=svg.COMPRESSED)
        if logarithmic:
            axes.set_xscale("log")
            axes.set_xlim(10 ** (len(str(min(sizes))) - 1) * 0.8, max(sizes) * 1.3)
            axes.xaxis.set_major_locator(LogLocator(10, numticks=8))
            axes.xaxis.set_minor_locator(LogLocator(10, subs=(), numticks=8))
        else:
            axes.set_xlim(0, max(sizes) * 1.03)
            axes.xaxis.set_major_locator(_ticks(5))
        axes.xaxis.set_major_formatter(_BYTES)
        axes.tick_params(axis="x", labeltop=True, labelbottom=len(sizes) > 12)
        _rows(axes, names, svg.MONO)
        _columns(axes, layers)

    told = f"Bytes in the file of {len(layers)} layers; the numbers stand in the layer table"
    return _draw((left + 216 + 460, 50 + _ROW * len(layers)), "layers", told, draw)


def _columns(axes: Axes, layers: Sequence[Row]) -> None:
    """Columns of numbers on the right of the bars: bytes, p, b and the ratio, with their heads."""
    columns = (
        (64, "bytes", [words.size(row["bytes"]) for row in layers]),
        (114, "p", [words.number(row["p"], 3) for row in layers]),
        (140, "b", [str(row["bits"]) for row in layers]),
        (204, "ratio", [words.ratio(row["ratio"]) for row in layers]),
    )
    for right, head, cells in columns:
        for place, cell in enumerate([head, *cells], start=-1):
            _beside(axes, place, right, cell)


def search(name: str, layer: str, trials: Sequence[Row], reference: float | None) -> Markup:
    """One layer's search: measured error over bytes, the chosen point marked, the uncompressed network's error as a line."""

    def draw(figure: Figure, axes: Axes) -> None:
        _margins(figure, 40, 14, 8, 36)
        if reference is not None:
            axes.axhline(reference, color=svg.ORIGINAL, linestyle="--", linewidth=1.2)
        for origin, fill in (("start", svg.PAPER), ("bayes", svg.MUTED)):
            points = [
                row
                for row in trials
                if (row["origin"] == "start") == (origin == "start") and not row["bound"]
            ]
            x, y = [row["bytes"] for row in points], [row["error_percent"] for row in points]
            axes.plot(x, y, "o", markersize=4.5, color=fill, markeredgecolor=svg.MUTED, markeredgewidth=1)
        ended = [row for row in trials if row["bound"]]  # at least this error: an arrow upwards
        x, y = [row["bytes"] for row in ended], [row["error_percent"] for row in ended]
        axes.plot(x, y, "^", markersize=4, color=svg.PAPER, markeredgecolor=svg.MUTED, markeredgewidth=0.8)
        chosen = [row for row in trials if row["chosen"]]
        x, y = [row["bytes"] for row in chosen], [row["error_percent"] for row in chosen]
        axes.plot(x, y, "D", markersize=7.5, color=svg.COMPRESSED, markeredgecolor=svg.PAPER)
        axes.margins(x=0.1, y=0.1)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(_ticks(3))
        axes.yaxis.set_major_locator(_ticks(4))
        axes.xaxis.set_major_formatter(_BYTES)
        axes.set_ylabel("error, %", labelpad=2)
        axes.set_xlabel("size", labelpad=2)

    told = f"Search of {words.printable(layer)}: top-1 error over bytes, {len(trials)} points"
    return _draw((264, 176), name, told, draw)


def front(points: Sequence[Row], chosen: Row | None) -> Markup:
    """The choices of all lambdas: what the layers add in error, summed, over their bytes; the chosen one marked."""

    def draw(figure: Figure, axes: Axes) -> None:
        _margins(figure, 52, 14, 8, 40)
        x, y = [row["bytes"] for row in points], [row["added_error_points"] for row in points]
        axes.plot(x, y, "o-", markersize=4, linewidth=1.2, color=svg.MUTED)
        if chosen is not None:
            axes.plot(
                chosen["bytes"], chosen["added_error_points"], "D", markersize=7.5, color=svg.COMPRESSED,
                markeredgecolor=svg.PAPER,
            )  # fmt: skip
        axes.margins(x=0.06, y=0.1)
        axes.set_xlim(left=0)
        axes.set_yscale("symlog", linthresh=1.0)
        axes.xaxis.set_major_locator(_ticks(5))
        axes.xaxis.set_major_formatter(_BYTES)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylabel("added error, points")
        axes.set_xlabel("size of all layers")

    return _draw((460, 236), "front", f"Added error over bytes of all layers, {len(points)} choices", draw)


def curve(name: str, ylabel: str, series: Sequence[Series]) -> Markup:
    """A value per epoch, a line per network; epochs without a value are left out."""

    def draw(figure: Figure, axes: Axes) -> None:
        _margins(figure, 52, 14, 26, 38)
        for line in series:
            pairs = [(x, y) for x, y in zip(line.epochs, line.values, strict=True) if words.known(y)]
            kind = "--" if line.dashed else "-"
            axes.plot(
                *zip(*pairs, strict=True), kind, marker="o", markersize=4, color=line.colour, label=line.name
            )
        axes.xaxis.set_major_locator(_ticks(6, whole=True))
        axes.yaxis.set_major_locator(_ticks(5))
        axes.margins(x=0.04, y=0.1)
        axes.set_xlabel("epoch")
        axes.set_ylabel(ylabel)
        axes.legend(loc="lower right", bbox_to_anchor=(1.02, 0.98), ncols=2, borderpad=0, handlelength=1.8)

    return _draw((460, 236), name, f"{ylabel} per epoch: {', '.join(line.name for line in series)}", draw)


def classes(rows: Sequence[tuple[str, float, float]]) -> Markup:
    """Top-1 accuracy per class, (name, original %, compressed %), a row per class in the given order."""
    names = [words.printable(name, 34) for name, _, _ in rows]
    left = 16 + 6.9 * max(map(len, names))

    def draw(figure: Figure, axes: Axes) -> None:
        _margins(figure, left, 96, 46, 38)
        for place, (_, before, after) in enumerate(rows):
            axes.plot([before, after], [place, place], color=svg.MUTED, linewidth=1.2)
            _beside(axes, place, 62, words.signed(after - before, 1))
        _beside(axes, -1, 62, "change")
        places = range(len(rows))
        original, compressed = [row[1] for row in rows], [row[2] for row in rows]
        axes.plot(original, places, "o", label="original", color=svg.PAPER, markersize=6.5, **_RIM)
        axes.plot(compressed, places, "o", label="compressed", color=svg.COMPRESSED, markersize=6)
        _rows(axes, names)
        axes.margins(x=0.05)
        axes.xaxis.set_major_locator(_ticks(6))
        axes.set_xlabel("top-1 accuracy of the class, %")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderpad=0, handletextpad=0.2)

    told = f"Top-1 accuracy of {len(rows)} classes, original and compressed; the numbers stand in the table below"
    return _draw((left + 96 + 400, 84 + _ROW * len(rows)), "classes", told, draw)
