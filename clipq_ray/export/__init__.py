"""A compressed network in the formats of other tools: dense weights, as they come out of the file.

    export("runs/model=a/run=r-1", "a.safetensors")   the decoded tensors
    export("a.clq", "a.onnx")                         the network, checked by onnxruntime
    export("a.clq", "folder/")                        a Hugging Face style folder with a model card

    formats.py   which format an output has
    source.py    what is exported, and what its run says of it
    onnx.py      the network as ONNX bytes, and the check of its outputs
    hub.py       the folder
    card.py      the folder's README.md

Every file is written whole. Not covered: sparse or quantized execution (weights are float32 in every format), and uploading.
"""

from __future__ import annotations

import os

from clipq_ray import loading, manifest, outputs
from clipq_ray.errors import ConfigError, StorageError
from clipq_ray.export.formats import FORMATS, format_of
from clipq_ray.storage import Store

__all__ = ["FORMATS", "export", "format_of"]


def export(
    uri: str | os.PathLike[str],
    output: str,
    format: str | None = None,
    *,
    base_model: str | None = None,
    force: bool = False,
) -> str:
    """Write the network at `uri` (a .clq file or a run directory) to `output`, and say in one line what was written.

    `format` is one of `FORMATS`, or None: by the ending of `output`. A single file replaces what is there, unless that is the network itself or
    lies in a committed run; a folder that holds something is refused unless `force`. `base_model` is the Hub's name of the uncompressed network, for the model card.
    """
    chosen = format_of(output, format)
    if base_model is not None and chosen != "huggingface":
        raise ConfigError(f"a base model belongs to a model card, which {chosen} has not; leave it out")
    # The decoder and torch take seconds to import; a wrong ending is said at once.
    from clipq_ray.export import hub, onnx
    from clipq_ray.export.source import Source

    if chosen == "huggingface":
        folder = outputs.output_folder(output, "the output")
        if not force and (found := folder.names()):
            raise StorageError(
                f"expected no files in {output}, got {found[0]}; choose another folder or pass --force"
            )
        source = Source.read(uri)
        with manifest.understood(os.fspath(uri)):
            files = hub.files(source, base_model)
        for name, data in files.items():
            folder.write(name, data)
        return f"{output}: {', '.join(f'{name} {len(data):,} bytes' for name, data in files.items())}"
    store, name = outputs.output(output, "the output")
    if _same(loading.file_at(uri), (store, name)):
        raise ConfigError(f"expected another file than the network itself, got {output}; choose another name")
    if chosen == "onnx":
        onnx.require()
        exported = onnx.convert(Source.read(uri))
        store.write(name, exported.data)
        return (
            f"{output}: {len(exported.data):,} bytes, outputs of {' and '.join(map(str, onnx.CHECKED_BATCHES))} random images by "
            f"onnxruntime differ by {exported.difference:.1e} of the largest at most"
        )
    state = Source.read(uri).stored()
    data = Source.safetensors(state)
    store.write(name, data)
    return f"{output}: {len(state)} tensors, {len(data):,} bytes"


def _same(file: tuple[Store, str] | None, other: tuple[Store, str]) -> bool:
    """Whether two names are one file, by links of either kind too."""
    if file is None or file[0].local is None or other[0].local is None:
        return file == other
    try:
        return os.path.samefile(file[0].local / file[1], other[0].local / other[1])
    except OSError:  # one is not there
        return False
