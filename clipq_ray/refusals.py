"""What it means when storage refuses, and what to do: words for errors of file systems and the answers of S3.

Not covered: what may pass by itself (`connections.passing`).
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from pathlib import Path

from clipq_ray.connections import chain, codes
from clipq_ray.redaction import redacted


def free(error: BaseException, local: Path | None) -> str:
    """What a full file system has left, in words; empty where another thing is wrong."""
    if local is None or not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    there = next((one for one in (local, *local.parents) if one.is_dir()), local)
    with contextlib.suppress(OSError):
        return f", {shutil.disk_usage(there).free:,} bytes are free"
    return ""


_REASONS = (
    (("NoSuchBucket",), "there is no such bucket"),
    (("InvalidAccessKeyId",), "the store does not know the access key"),
    (("SignatureDoesNotMatch",), "the store refuses the secret key"),
    (("QuotaExceeded", "EntityTooLarge"), "the store is full for this account"),
    (("AccessDenied", "403"), "the store refuses access"),
    (("EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError", "ConnectionRefusedError"), "the store cannot be reached"),
    (
        ("ConnectionClosedError", "ServerDisconnectedError", "ConnectionResetError", "BrokenPipeError", "ClientPayloadError", "IncompleteReadError",
         "ResponseStreamingError"),
        "the store cut the connection",
    ),
    (("ReadTimeoutError", "TimeoutError", "FSTimeoutError"), "the store did not answer in time"),
    (("SlowDown", "503", "ServiceUnavailable"), "the store is too busy"),
    (("InternalError", "500", "502", "504"), "the store had an error of its own"),
)  # fmt: skip
"""What the answers of S3 mean, where its clients' own words say less."""


_ADVICE = (
    (("NoSuchBucket",), "create the bucket first or correct its name"),
    (
        ("NoCredentialsError", "PartialCredentialsError", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "TokenRetrievalError",
         "CredentialRetrievalError"),
        "check the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the machine's role)",
    ),
    (("ProfileNotFound",), "correct AWS_PROFILE or unset it"),
    (("AccessDenied", "403"), "allow these credentials to get, put, delete and list objects there, and to list and abort multipart uploads"),
    (("RequestTimeTooSkewed", "RequestExpired"), "set this machine's clock"),
    (("PermissionError",), "give yourself permission there or choose another storage"),
    (
        ("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ClientConnectorError", "ConnectionError", "ConnectionRefusedError",
         "ConnectionClosedError", "ServerDisconnectedError", "ConnectionResetError", "BrokenPipeError", "ClientPayloadError", "IncompleteReadError",
         "ResponseStreamingError"),
        "check AWS_ENDPOINT_URL and the network",
    ),
    (("QuotaExceeded",), "free space there or choose another storage"),
    (("SlowDown", "503", "ServiceUnavailable", "InternalError", "500", "502", "504", "TimeoutError", "FSTimeoutError"), "try again later"),
    (("NoRegionError", "InvalidRegionError", "PermanentRedirect", "AuthorizationHeaderMalformed", "301"), "set AWS_DEFAULT_REGION to the bucket's region"),
    (("FileNotFoundError",), "check the URI"),
    (("NotADirectoryError", "FileExistsError"), "choose a path whose parents are directories"),
    (("IsADirectoryError",), "name a file, not a directory"),
)  # fmt: skip
_ADVICE_BY_NUMBER = {
    errno.ENOSPC: "free space there or choose another storage",
    errno.EDQUOT: "free space in your quota or choose another storage",
    errno.EROFS: "choose a storage that is not read-only",
}


def line(error: BaseException) -> str:
    """What went wrong, in one line without secrets: what an answer of S3 means, else the error's own words."""
    found = codes(error)
    for names, words in _REASONS:
        if said := sorted(found & set(names)):
            return f"{words} ({said[0]})"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    # Half a secret would not be known as one.
    return redacted(" ".join(text.split()))[:300] or type(error).__name__


def advice(error: BaseException, otherwise: str = "check the URI and the storage behind it") -> str:
    """What to do about it; `otherwise`: where nothing is known of it."""
    for one in chain(error):
        if isinstance(one, OSError) and one.errno in _ADVICE_BY_NUMBER:
            return _ADVICE_BY_NUMBER[one.errno]
        if "Invalid endpoint" in str(one):  # a ValueError of botocore
            return "write AWS_ENDPOINT_URL with http:// or https://"
    found = codes(error)
    return next((words for names, words in _ADVICE if found & set(names)), otherwise)
