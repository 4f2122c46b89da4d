"""The .clq file: bytes first, files second. `SPEC.md` beside this module is the format; the code follows it.

`encode` and `decode` are mirrors, as are `CodedLayer.from_quantized` and `CodedLayer.values`.
"""

from clipq_ray.codec.container import Entry, Packed, decode, encode, entries, metadata
from clipq_ray.codec.layers import CodedLayer, Profile, coded, layer_bytes
from clipq_ray.codec.plain import stored

__all__ = [
    "CodedLayer",
    "Entry",
    "Packed",
    "Profile",
    "coded",
    "decode",
    "encode",
    "entries",
    "layer_bytes",
    "metadata",
    "stored",
]
