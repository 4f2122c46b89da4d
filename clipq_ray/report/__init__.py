"""The HTML report of one run: one self-contained page from the manifest and the run's tables.

`render` takes what a run stores (the manifest, and `layers`, `trials`, `predictions` as pyarrow tables with the schemas of
`clipq_ray.tables`) and returns the page. The page loads nothing: style, charts (SVG by matplotlib) and text stand in it. The same inputs and
library versions give the same bytes.

    page.py        what the page says: sections, tables, captions
    charts.py      the figures
    svg.py         a matplotlib figure as inline SVG that follows the reader's light or dark theme
    agreement.py   predictions against labels and against each other
    words.py       numbers with units, as text
    fleet.py       what the page of a fleet says
    template.html, fleet.html, parts.html  the pages, and what they share

Not covered: reading a run (`jobs/report.py` does), measuring anything (every number was measured by the pipeline). jinja2 and
matplotlib come with `clipq_ray[report]` and are imported on the first `render`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from clipq_ray.errors import ConfigError

__all__ = ["missing", "render", "render_fleet"]

_PACKAGES = ("jinja2", "matplotlib")


def missing() -> list[str]:
    """The packages of the extra `[report]` that are not installed; empty when a report can be rendered."""
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


def render(
    manifest: dict[str, Any], layers: pa.Table, trials: pa.Table, predictions: pa.Table | None = None
) -> str:
    """One run as an HTML page.

    `manifest` is the content of manifest.json; its `files` may be absent (before the commit). `layers`, `trials` and `predictions` have
    the schemas of `clipq_ray.tables`; `trials` may be empty (no search), `predictions` empty or None. What is missing is said on
    the page. Raises `ConfigError` if matplotlib or jinja2 is not installed, `FormatError` if the manifest lacks its sizes or the tables a column.
    """
    _refuse_missing()
    from clipq_ray.report.page import page

    return page(manifest, layers, trials, predictions)


def render_fleet(manifest: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """A fleet as an HTML page, from its manifest (`files` may be absent) and the rows of its table; errors as in `render`."""
    _refuse_missing()
    from clipq_ray.report.fleet import page

    return page(manifest, rows)


def _refuse_missing() -> None:
    if absent := missing():
        raise ConfigError(
            f"the report needs {' and '.join(absent)}, not installed here: install clipq_ray[report]"
        )
