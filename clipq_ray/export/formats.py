"""Which format an output has: what the user says, or what its ending says. Not covered: whether it can be written (`storage`)."""

from __future__ import annotations

from clipq_ray.errors import ConfigError

FORMATS = ("safetensors", "onnx", "huggingface")


def format_of(output: str, given: str | None = None) -> str:
    """One of `FORMATS`; `ConfigError` where neither `given` nor the ending names one."""
    if given is not None:
        if given not in FORMATS:
            raise ConfigError(f"expected a format of {', '.join(FORMATS)}, got {given!r}")
        return given
    for ending, name in ((".safetensors", "safetensors"), (".onnx", "onnx"), ("/", "huggingface")):
        if output.endswith(ending):
            return name
    raise ConfigError(
        f"expected an output that ends in .safetensors, .onnx or / (a Hugging Face folder), got {output!r}; add the ending or pass --format"
    )
