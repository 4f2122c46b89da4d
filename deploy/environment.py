"""What `metadata.environment` of a cluster file says, as lines that a shell reads: `python deploy/environment.py ~/ray_bootstrap_config.yaml`.

And what the cluster may grow to, as `CLIPQ_MAY_GROW`: Ray tells its jobs only what is there. `ray up` leaves the file on the head. Names that are none are refused. Standard library only: the environment of the node may not be there yet.
"""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any


def lines(path: str) -> list[str]:
    """`NAME=value` for each variable that has a value, quoted; switches as 1 and 0."""
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    given = (config.get("metadata") or {}).get("environment") or {}
    for name in given:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            sys.exit(
                f"environment: expected names of variables in metadata.environment, got {name!r}; mend the cluster file"
            )
    if growth := may_grow(config):
        given = {"CLIPQ_MAY_GROW": json.dumps(growth), **given}
    said = {name: int(value) if isinstance(value, bool) else value for name, value in given.items()}
    return [f"{name}={shlex.quote(str(value))}" for name, value in said.items() if value is not None]


def may_grow(config: dict[str, Any]) -> dict[str, Any]:
    """The kinds of workers that the autoscaler may start, and how many; empty where the cluster file does not say what they have."""
    kinds = [
        {"resources": kind["resources"], "count": kind.get("max_workers", config.get("max_workers", 0))}
        for name, kind in (config.get("available_node_types") or {}).items()
        if name != config.get("head_node_type") and kind.get("resources")
    ]
    return {"nodes": config.get("max_workers", 0), "kinds": kinds} if kinds else {}


if __name__ == "__main__":
    print("\n".join(lines(sys.argv[1])))
