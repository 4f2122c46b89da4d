"""Networks by name and weights by URI.

`small` holds the networks built in here, `registry` finds and builds networks by name, `weights` reads state dicts and puts them into a
network. torchvision is imported only where one of its networks is asked for. Not covered: networks of other libraries, except through
`package.module:function`.
"""

from clipq_ray.models.definition import definition_sha256
from clipq_ray.models.limits import Limit
from clipq_ray.models.registry import (
    Architecture,
    PublishedInput,
    architecture,
    build,
    default_input,
    default_kwargs,
    default_weights,
    image_channels,
    imported,
    names,
    published_input,
)
from clipq_ray.models.weights import apply_weights, read_weights, weights_sha256

__all__ = [
    "Architecture",
    "Limit",
    "PublishedInput",
    "apply_weights",
    "architecture",
    "build",
    "default_input",
    "default_kwargs",
    "default_weights",
    "definition_sha256",
    "image_channels",
    "imported",
    "names",
    "published_input",
    "read_weights",
    "weights_sha256",
]
