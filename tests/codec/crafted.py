"""Files with right checksums around whatever a test lets the header and the blobs say."""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

from clipq_ray.codec import varint
from clipq_ray.codec.dictionaries import DICTIONARIES


def crafted(
    content: Any, *blobs: bytes, version: int = 3, tail: bytes = b"", sizes: bytes | None = None
) -> bytes:
    """A file whose header is `content`: JSON, or its text, or its bytes; `sizes`: what stands for the blobs' sizes, else the right ones."""
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=DICTIONARIES[version])
    packed = squeeze.compress(text.encode() if isinstance(text, str) else text) + squeeze.flush()
    if version > 1:
        packed += b"".join(varint.write(len(blob)) for blob in blobs) if sizes is None else sizes
    packed += tail
    prefix = struct.pack("<3sBII", b"CLQ", version, len(packed), zlib.crc32(packed))
    return prefix + packed + b"".join(struct.pack("<I", zlib.crc32(blob)) + blob for blob in blobs)


def one_tensor(shape: Any, coder: Any, blob: bytes, version: int = 3) -> bytes:
    """A file of one tensor, `w`."""
    if version == 1:
        return crafted({"t": [["w", shape, coder, len(blob)]], "m": {}}, blob, version=1)
    return crafted({"n": ["w"], "s": [shape], "c": [coder], "m": {}}, blob, version=version)
