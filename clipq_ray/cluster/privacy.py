"""What Ray must not pass on: Tune copies the driver's AWS keys into the environment that its actors are started with, and Ray writes that into its
logs and shows it on its dashboard.

Every node has credentials of its own for all that the job does there, so nothing needs the copy. Not covered: an environment that a user gives to the
Ray job itself (`runtime_env`), which Ray logs as well.
"""

from __future__ import annotations

from ray.tune.execution import class_cache

_NAMES = "ENV_VARS_TO_PROPAGATE"


def keep_keys() -> set[str]:
    """Let Tune pass on no keys of AWS; the names that it passed on before."""
    before: set[str] = getattr(class_cache, _NAMES, set())
    setattr(class_cache, _NAMES, {name for name in before if not name.startswith("AWS_")})
    return before


def pass_on(names: set[str]) -> None:
    """As it was, for a caller's own jobs."""
    setattr(class_cache, _NAMES, names)
