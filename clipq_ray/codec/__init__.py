"""The .clq file: bytes first, files second. `SPEC.md` beside this module is the format; the code follows it.

`encode` and `decode` are mirrors, as are `CodedLayer.from_quantized` and `CodedLayer.values`; `arrays` is what a network loads.
"""

from clipq_ray.codec.coders import Profile
from clipq_ray.codec.container import (
    Packed,
    Tensor,
    arrays,
    arrays_from,
    decode,
    encode,
    entries,
    metadata,
    read_header,
)
from clipq_ray.codec.header import Entry, norm_names
from clipq_ray.codec.layers import CodedLayer, coded, layer_bytes, smallest
from clipq_ray.codec.plain import stored
from clipq_ray.codec.vectors import Vector, on_grid

__all__ = [
    "CodedLayer",
    "Entry",
    "Packed",
    "Profile",
    "Tensor",
    "Vector",
    "arrays",
    "arrays_from",
    "coded",
    "decode",
    "encode",
    "entries",
    "layer_bytes",
    "metadata",
    "norm_names",
    "on_grid",
    "read_header",
    "smallest",
    "stored",
]
