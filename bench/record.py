"""What every bench writes: `bench/results/NAME.json` with machine, versions and rows, and a table on the terminal.

A row with a goal says whether it is met; without one it is information. `python bench/record.py` prints every row of all results that
falls short (`make bench`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Row:
    """One number: the median of `n` measurements, `spread` their interquartile range."""

    name: str
    value: float
    unit: str
    goal: float | None = None
    better: Literal["lower", "higher"] = "lower"
    n: int = 1
    spread: float = 0.0

    @property
    def met(self) -> bool:
        """Whether there is no goal or it is reached."""
        if self.goal is None:
            return True
        return self.value <= self.goal if self.better == "lower" else self.value >= self.goal


def row(name: str, values: Sequence[float], unit: str, **more: Any) -> Row:
    """A row of several measurements."""
    spread = 0.0
    if len(values) > 1:
        first, _, third = statistics.quantiles(values, n=4, method="inclusive")
        spread = third - first
    return Row(name, statistics.median(values), unit, n=len(values), spread=spread, **more)


def write(
    bench: str, rows: Sequence[Row], folder: Path = RESULTS, *, notes: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> Path:  # fmt: skip
    """Store the rows whole and print them; `notes` are what no row can say (settings), `versions` those of peers."""
    from clipq_ray import identity

    content: dict[str, Any] = {
        "bench": bench, "commit": commit(), "machine": machine(), "versions": {**identity.versions(), **(versions or {})},
        **({"notes": dict(notes)} if notes else {}),
        "rows": [asdict(one) for one in rows],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{bench}.json"
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    print(table(rows))
    return path


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text."""
    cells = [
        (one.name, f"{one.value:,.0f}" if one.unit == "bytes" else f"{one.value:.5g}", one.unit, "" if one.goal is None else f"{'<=' if one.better == 'lower' else '>='} {one.goal:g}",
         "" if one.goal is None else ("met" if one.met else "SHORT"), f"n={one.n} iqr={one.spread:.3g}")
        for one in rows
    ]  # fmt: skip
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))] if cells else []
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def positive(text: str) -> int:
    """A whole number from 1 on, of a command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def chosen(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Those of `known` that are called as one of `names`, or begin so where none is; `ConfigError` for a name that none begins with."""
    from clipq_ray.errors import ConfigError

    found: set[str] = set()
    for name in names:
        called = [one for one in known if one == name] or [one for one in known if one.startswith(name)]
        if not called:
            raise ConfigError(f"--only: expected the beginning of one of {', '.join(known)}, got {name!r}")
        found |= set(called)
    return [one for one in known if one in found]


def machine() -> dict[str, Any]:
    """CPU, cores, memory and GPU of this machine."""
    model = ""
    if (info := Path("/proc/cpuinfo")).exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else ""
    import torch

    return {
        "cpu": model or platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    """What this checkout is: its commit, "-dirty" behind it where files that git follows were changed, other than the results of benches."""
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ":!bench/results", ":!bench/records"
    )
    found = _git("rev-parse", "--short=12", "HEAD")
    return found + "-dirty" * bool(changed) if found else "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> int:
    """Print the rows that fall short of their goals."""
    short = []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        short += [one for one in (Row(**fields) for fields in content["rows"]) if not one.met]
    print(table(short) if short else "every row with a goal meets it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
