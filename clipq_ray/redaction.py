"""What must never be written or said: credentials in URIs, and the values of this process's own secret variables.

Every text that leaves a job goes through `redacted`: lines on the terminal, errors, manifests. Not covered: what foreign libraries log by
themselves (their loggers stay at warnings).
"""

from __future__ import annotations

import os
import re
from typing import Any

# A secret may have slashes in it, a host may have a port.
_USER = re.compile(
    r"((?:\b[a-z][a-z0-9+.-]*:)?//)(?:[^/\s'\"]+|[^/\s:@'\"\[]+:(?!\d{1,5}/)[^\s@'\"]+(?:@[^/\s@'\"]+)*)@",
    re.IGNORECASE,
)
_PAIR = re.compile(r"(?<![\w/])[^\s/:@'\"]+:[^\s/@'\"]+@(?=[\w.-])")
# Clients of S3 take a URI's user and its secret up to the first slash for a bucket, and say so.
_BUCKET = re.compile(
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}:[^\s@'\"]+|(?<=bucket name \")[^\s@\"]+:[^\s@\"]+", re.IGNORECASE
)
_QUERY = re.compile(
    r"([?&;#](?:x-(?:amz|goog)-[\w-]+|awsaccesskeyid|googleaccessid|sig|se|sp|sv|key|key-pair-id|policy|auth|"
    r"[\w-]*(?:signature|token|password|passwd|secret|credential|(?:api|access|secret|private)[_-]?key))=)"
    r"[^&;\s'\"]+",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"SECRET|PASSWORD|TOKEN|CREDENTIAL|API_?KEY|PRIVATE_KEY|ACCOUNT_KEY", re.IGNORECASE)
_SHORTEST = 8  # a shorter value would be found by chance
MARK = "***"


def redacted(text: str) -> str:
    """`text` with every secret in it as three stars."""
    text = _QUERY.sub(rf"\1{MARK}", _USER.sub(rf"\1{MARK}@", text))
    text = _BUCKET.sub(MARK, _PAIR.sub(f"{MARK}@", text))
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _VARIABLE.search(name) and value in text and not os.path.exists(value):
            text = text.replace(value, MARK)
    return text


def redacted_json(value: Any) -> Any:
    """A JSON value with every text in it redacted."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {name: redacted_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_json(one) for one in value]
    return value
