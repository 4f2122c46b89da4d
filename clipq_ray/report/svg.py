"""A matplotlib figure as inline SVG that follows the reader's theme.

A chart is drawn with the colours of `INK`..`COMPRESSED`, which are placeholders: in the SVG each becomes a CSS variable of the page (`var(--ink)` and so on),
so one figure serves light and dark. Text stays text, in the page's fonts. The SVG is rewritten as a tree, not as a
string, so that no name inside it can be mistaken for markup. Sizes are in CSS pixels. Not covered: what is drawn (`charts`).
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

# Placeholders, not looks: the page's style sheet says what they are in light and in dark.
INK, MUTED, GRID = "#010101", "#010102", "#010103"
ORIGINAL, CONTROL, COMPRESSED, PAPER = "#010104", "#010105", "#010106", "#010107"
COLOURS = {"original": ORIGINAL, "control": CONTROL, "compressed": COMPRESSED}
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    ORIGINAL: "--original",
    CONTROL: "--control",
    COMPRESSED: "--compressed",
    PAPER: "--paper",
}
MONO = "monospace"
_FAMILIES = re.compile(r"font-family:[^;]*")
_REFERENCE = re.compile(r"#([\w.-]+)")

# Any: matplotlib's stubs want the literal names of settings.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "clipq_ray",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "font.size": 11.0,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11.0,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "lines.linewidth": 1.5,
    "lines.markersize": 5.0,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
}


@contextmanager
def style() -> Iterator[None]:
    """The report's style while a figure is made and written, whatever the reader's own matplotlib settings are."""
    with mpl.rc_context(), warnings.catch_warnings():
        # A glyph that matplotlib's font lacks is drawn by the browser: text stays text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def canvas(width: float, height: float) -> Figure:
    """An empty figure of that many CSS pixels; call inside `style`."""
    return Figure(figsize=(width / 72, height / 72), dpi=72)


def inline(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an `<svg>` element; `name` (unique on the page) keeps its ids apart, `description` is for screen readers."""
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}style", "}metadata")):
                parent.remove(child)
    wanted = {found for element in root.iter() for found in _references(element)}
    for element in root.iter():
        _rewrite(element, name, wanted)
    width, height = root.attrib.pop("width"), root.attrib.pop("height")
    root.attrib.pop("version", None)
    root.set("width", width.removesuffix("pt"))
    root.set("height", height.removesuffix("pt"))
    root.set("role", "img")
    root.set("aria-label", description)
    # Markup: ElementTree has escaped every text and attribute of the tree.
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _references(element: ElementTree.Element) -> list[str]:
    """The ids that an element's attributes point at."""
    values = (value for key, value in element.attrib.items() if key.endswith(("href", "clip-path")))
    return [found for value in values for found in _REFERENCE.findall(value)]


def _rewrite(element: ElementTree.Element, name: str, wanted: set[str]) -> None:
    """Plain tags, ids that are unique on the page, theme colours, the page's fonts."""
    element.tag = element.tag.rpartition("}")[2]
    element.tail = None
    if element.tag != "text":
        element.text = None
    for key, value in list(element.attrib.items()):
        del element.attrib[key]
        key = key.rpartition("}")[2]
        if key == "id":
            if value not in wanted:
                continue
            value = f"{name}-{value}"
        elif key in ("href", "clip-path"):
            value = _REFERENCE.sub(rf"#{name}-\1", value)
        elif key == "d":
            value = " ".join(value.split())
        elif key == "style":
            value = _themed(value)
        element.set(key, value)


def _themed(declarations: str) -> str:
    """A style attribute with the page's colours and fonts."""
    for colour, variable in _VARIABLES.items():
        declarations = declarations.replace(colour, f"var({variable})")
    family = "var(--mono)" if "Mono" in declarations else "var(--sans)"
    return _FAMILIES.sub(f"font-family: {family}", declarations)
