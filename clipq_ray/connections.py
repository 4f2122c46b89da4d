"""How a store on the network is reached: one way to name endpoint, region, credentials and checksums, and what is done when it does not answer.

Everything is named as AWS's own clients name it: the environment (AWS_ENDPOINT_URL, AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID, ...), a profile
(AWS_PROFILE), or the role of the machine; where an endpoint is named, buckets stand in the path. pyarrow gets the same connection (`Objects.arrow`).
A request to S3 is tried again by its client, four times (AWS_MAX_ATTEMPTS, 5) with backoff and jitter; and by `Connection.patiently` for `PATIENCE_SECONDS`, where the
store has answered before, this process or others of its job (`answered`): one that never did is a mistake in the URI, and said at once. Not covered: what is asked of a store (`backends`).
"""

from __future__ import annotations

import errno
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec

from clipq_ray.errors import ConfigError

S3 = ("s3", "s3a")
PATIENCE_SECONDS = 120.0
"""How long a store that has answered before is asked again; the environment's CLIPQ_S3_PATIENCE_SECONDS counts more."""

_BODY_ATTEMPTS = 2  # of s3fs: answers that are cut off in the middle


_ANSWERED = False
_CHANCE = random.SystemRandom()
"""Takes no number from those that a network may draw in another thread."""
_T = TypeVar("_T")


class Connection:
    """A protocol's file system, made at first use and again after a fork; listings are never cached."""

    def __init__(self, protocol: str) -> None:
        """`ImportError` if the protocol's package is missing, `ValueError` if nobody knows the protocol."""
        self.protocol = protocol
        find: Any = fsspec.get_filesystem_class
        self._kind: Any = find(protocol)
        self._made: tuple[int, Any] | None = None
        self._answers = _ANSWERED

    def open(self) -> Any:
        """This process's own file system."""
        process = os.getpid()
        made = self._made
        # No lock: one that another thread holds while this process forks would never open in the child.
        if made is None or made[0] != process:
            options = {"skip_instance_cache": True, "use_listings_cache": False, **_options(self.protocol)}
            self._made = made = (process, self._kind(**options))
            if self.protocol in S3:
                made[1].retries = _BODY_ATTEMPTS
        return made[1]

    def call(self, method: str, *given: Any, **options: Any) -> Any:
        """What the file system's `method` gives, `patiently`."""
        return self.patiently(lambda: getattr(self.open(), method)(*given, **options))

    def patiently(self, ask: Callable[[], _T]) -> _T:
        """What `ask` gives, which asks this store; where it has answered before and fails for the moment, it is asked again."""
        waits = delays(patience()) if self._answers else iter(())
        while True:
            try:
                result = ask()
            except Exception as error:
                if not passing(error):
                    self._answers = True
                    raise
                wait = next(waits, None)
                if wait is None:
                    self._answers = False  # nobody waits a second time for a store that is gone
                    raise
                time.sleep(wait)
            else:
                self._answers = True
                return result


_SHARED: dict[tuple[tuple[str, str], ...], Connection] = {}


def connection(protocol: str) -> Connection:
    """The connection of this process to `protocol` with what the environment says now; `ImportError` and `ValueError` as `Connection`."""
    said = sorted(item for item in os.environ.items() if item[0].startswith(("AWS_", "CLIPQ_S3_")))
    key = (("protocol", protocol), *said)
    if key not in _SHARED:
        _SHARED[key] = Connection(protocol)
    return _SHARED[key]


def answered() -> None:
    """Stores have answered others of this job: this process, which begins in the middle of it, waits for one that does not as they do."""
    global _ANSWERED
    _ANSWERED = True
    for one in _SHARED.values():
        one._answers = True


def patience() -> float:
    """How long this process waits for a store that has answered before [s]; `ConfigError` where the environment says no such time."""
    return _seconds("CLIPQ_S3_PATIENCE_SECONDS", PATIENCE_SECONDS)


def _seconds(name: str, usual: float) -> float:
    said = os.environ.get(name, "")
    try:
        found = float(said) if said else usual
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise ConfigError(
            f"expected a number of seconds, 0 or more, in {name}, got {said!r}; correct it, or unset it"
        )
    return found


def _attempts() -> int:
    """How often clients of S3 try a request."""
    said = os.environ.get("AWS_MAX_ATTEMPTS") or "5"
    if not said.isascii() or not said.isdecimal() or int(said) < 1:
        raise ConfigError(
            f"expected a number of attempts, 1 or more, in AWS_MAX_ATTEMPTS, got {said!r}; correct it, or unset it"
        )
    return int(said)


def delays(limit: float) -> Iterator[float]:
    """Waits before further attempts [s]: doubling from half a second to 20 s, each between half of that and all of it by chance, `limit` in sum."""
    wait, left = 0.5, limit
    while left > 0:
        chosen = min(left, wait * _CHANCE.uniform(0.5, 1.0))
        yield chosen
        left -= chosen
        wait = min(20.0, 2 * wait)


def _options(protocol: str) -> dict[str, Any]:
    if protocol not in S3:
        return {}
    config: dict[str, Any] = {
        "connect_timeout": 10,
        "read_timeout": _seconds("CLIPQ_S3_TIMEOUT_SECONDS", 60.0),
        "retries": {"total_max_attempts": _attempts(), "mode": "standard"},
    }
    return {"config_kwargs": {**config, **_checksums()}}


def _checksums() -> dict[str, str]:
    """Ceph, rclone and others refuse or garble uploads with the trailing checksums that newer clients send by default; so where an endpoint is
    named, in the environment or in the profile, they are sent where an operation needs them, unless the user says otherwise there."""
    import botocore.session
    from botocore.configprovider import ConfiguredEndpointProvider
    from botocore.exceptions import BotoCoreError

    session = botocore.session.Session()
    try:
        profile = session.get_scoped_config()
        endpoint = ConfiguredEndpointProvider(session.full_config, profile, "s3").provide()
    except BotoCoreError:  # a profile that is not there; the first request says so
        return {}
    names = ("request_checksum_calculation", "response_checksum_validation")
    said = {name for name in names if f"AWS_{name.upper()}" in os.environ or name in profile}
    return {name: "when_required" for name in names if name not in said} if endpoint else {}


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def codes(error: BaseException) -> set[str]:
    """S3's error codes and the names of the exception classes that led here."""
    found: set[str] = set()
    for one in chain(error):
        found.add(type(one).__name__)
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            found.add(str(response.get("Error", {}).get("Code")))
    return found


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


def full(error: BaseException) -> bool:
    """Whether a store takes nothing any more, and will not take it from another process either."""
    said = any(isinstance(one, OSError) and one.errno in _FULL for one in chain(error))
    return said or bool(codes(error) & {"NoSuchBucket", "QuotaExceeded"})


_PASSING = {
    "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError", "HTTPClientError", "IncompleteReadError",
    "ResponseStreamingError", "ClientConnectorError", "ClientPayloadError", "ServerDisconnectedError", "TimeoutError", "FSTimeoutError",
    "ConnectionError", "ConnectionResetError", "ConnectionRefusedError", "ConnectionAbortedError", "BrokenPipeError",
    "500", "502", "503", "504", "InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout", "OperationAborted", "IncompleteBody", "BadDigest",
}  # fmt: skip


def passing(error: BaseException) -> bool:
    """Whether the same request may succeed later: the store is busy, cannot be reached, or was cut off."""
    return bool(codes(error) & _PASSING)
