"""The `clipq` command: look at what a job stored, check it, tidy up, and take it elsewhere.

    clipq inspect URI                     the table of a packed network, from the file alone
    clipq verify URI                      every hash of a file, a run, a fleet or a whole storage
    clipq prune URI [--yes]               what no run and no job needs any more, a day old: shown, then removed
    clipq export URI OUT                  dense for other tools: OUT.safetensors, OUT.onnx, or a Hugging Face style folder OUT/

URIs are local paths or anything that fsspec opens. Exit code 0: all is well; 2: damage, which `verify` lists, or a mistake in the input (one line on
stderr, no traceback). Not covered: making compressed networks and evaluating them (`jobs/`).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from clipq_ray import console
from clipq_ray.errors import ConfigError, StorageError
from clipq_ray.manifest import (
    committed,
    fleets,
    runs_of,
    verify,
    verify_clq,
    verify_fleet,
)
from clipq_ray.storage import MANIFEST, MODEL, Store

if TYPE_CHECKING:
    from clipq_ray import codec

_URIS = {
    "inspect": "a .clq file or a run directory",
    "verify": "a .clq file, a run or fleet directory, or a storage that holds them",
    "prune": "a storage",
    "export": "a .clq file or a run directory",
}

_COLUMNS = ("name", "shape", "coder", "levels", "non-zeros %", "bytes", "bits/weight")
_LEFT_COLUMNS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of `argv` (default: the process's arguments) and return its exit code."""
    return console.run("clipq", _dispatch, None if argv is None else list(argv))


def _dispatch(arguments: list[str]) -> int:
    parser = console.OneLineParser(
        prog="clipq", description="Look at, check, tidy up and export compressed networks."
    )
    commands = parser.add_subparsers(required=True, metavar="inspect|verify|prune|export")
    for name, command in (
        ("inspect", inspect_command),
        ("verify", verify_command),
        ("prune", prune_command),
        ("export", export_command),
    ):
        about = command.__doc__ or ""
        one = commands.add_parser(name, help=about.partition(";")[0].partition(".")[0], description=about)
        one.add_argument("uri", metavar="URI", help=_URIS[name])
        if name == "prune":
            one.add_argument("--yes", action="store_true", help="remove what is shown")
            one.add_argument(
                "--older-than-hours",
                metavar="X",
                default="24",
                help="only what nothing was written to for so long, by the clock of the storage (default: 24) [h]",
            )
        if name == "export":
            _add_export_arguments(one)
        one.set_defaults(command=command)
    given = vars(parser.parse_args(arguments))
    code: int = given.pop("command")(**given)
    return code


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "output",
        metavar="OUT",
        help="path or URI to write: OUT.safetensors, OUT.onnx (an existing file is replaced) or a folder OUT/",
    )
    parser.add_argument(
        "--format", metavar="NAME", help="safetensors, onnx or huggingface (default: by OUT's ending)"
    )
    parser.add_argument(
        "--base-model", metavar="ID", help="the Hub's name of the uncompressed network, for the model card"
    )
    parser.add_argument("--force", action="store_true", help="write into a folder that holds files already")


def inspect_command(uri: str) -> int:
    """Print the tensors of a packed network with shape, coder, levels, non-zeros and bytes, and the totals; from the file alone."""
    data, origin = _packed(uri)
    for line in describe(data, origin):
        console.show(line)
    return 0


def verify_command(uri: str) -> int:
    """Check every hash of one packed network, of all files of a run, of a fleet and its runs, or of all that a storage holds. Exit code 2 on damage."""
    problems: list[str] = []
    count, several = 0, 0
    for name, found, is_fleet in _checks(uri):
        count += 1
        several += is_fleet
        problems.extend(found)
        for line in found or [f"{name}: ok"]:
            console.show(line)
    if count > 1:
        what = f"{count - several} runs" + (f", {several} fleets" if several else "")
        console.show(f"{what}: {'all ok' if not problems else f'{len(problems)} problems'}")
    return 2 if problems else 0


def prune_command(uri: str, yes: bool, older_than_hours: str) -> int:
    """Show what a storage holds that no committed run names and no job under way uses: unfinished runs, stages, checkpoints, a day old; with --yes it is removed."""
    from clipq_ray.pruning import leftovers, remove

    hours, storage = _hours(older_than_hours), Store(uri)
    if storage.exists(MANIFEST):
        raise StorageError(
            f"expected a storage, got a run or a fleet at {uri}; give the directory that holds them"
        )
    if storage.uri.rpartition("/")[2].startswith("model=") or not any(
        storage.names(one) for one in ("model=", "_stages/", "fleet=")
    ):
        raise StorageError(f"expected a storage that jobs have written to, got none at {uri}; check the URI")
    both = leftovers(storage, hours)
    found = both.old
    for one in found:
        console.show(f"{one.bytes:>15,} bytes  {one.place}: {one.reason}")
    if both.young:
        console.show(
            f"{sum(one.bytes for one in both.young):>15,} bytes  in {len(both.young)} places were written to in the last {hours:g} hours, "
            "and stay; --older-than-hours 0 shows them"
        )
    total = sum(one.bytes for one in found)
    if not found:
        console.show(f"nothing{' else' if both.young else ''} is left over in {storage.uri}")
    elif yes:
        console.show(f"removed {remove(storage, found, console.show, hours):,} bytes")
    else:
        console.show(f"{total:,} bytes in {len(found)} places; nothing was removed, --yes removes them")
    return 0


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not 0 <= hours < math.inf:
        raise ConfigError(f"--older-than-hours: expected a number of hours, 0 or more, got {text!r}")
    return hours


def export_command(uri: str, output: str, **options: Any) -> int:
    """Write a packed network for other tools, with dense weights: tensors as safetensors, the network as ONNX (checked by onnxruntime), or a Hugging Face style folder with a model card; the output's ending decides."""
    from clipq_ray.export import export

    console.show(export(uri, output, **options))
    return 0


def describe(data: bytes, origin: str) -> Iterator[str]:
    """The lines that `clipq inspect` prints for the bytes of a .clq file; `FormatError` if it is damaged."""
    from clipq_ray import codec
    from clipq_ray.deep_compression import network_bytes

    packed, entries = codec.decode(data), codec.entries(data)
    yield from _headline(packed.metadata, origin)
    yield ""
    yield from _aligned([_COLUMNS, *(_row(entry, packed) for entry in entries)])
    yield ""
    weights = sum(entry.elements for entry in entries)
    coded = [entry for entry in entries if isinstance(packed.tensors.get(entry.name), codec.CodedLayer)]
    yield from _totals(coded, entries, weights, len(data))
    layers = [tensor for tensor in packed.tensors.values() if isinstance(tensor, codec.CodedLayer)]
    yield (
        f"for comparison with the literature only: as Deep Compression counts them, the layers would take {network_bytes(layers):,} bytes "
        "(relative index, Huffman, float32 codebooks)"
    )


def _headline(metadata: dict[str, Any], origin: str) -> Iterator[str]:
    """What the file says of itself; texts without control characters, since they come from anywhere."""
    from clipq_ray.report import words

    for line in _headlines(metadata, origin):
        yield words.printable(line)


def _headlines(metadata: dict[str, Any], origin: str) -> Iterator[str]:
    architecture = metadata.get("architecture") or {}
    options = ", ".join(f"{key}={value}" for key, value in (architecture.get("kwargs") or {}).items())
    yield f"{origin}: {architecture.get('name', 'unnamed architecture')}({options})"
    if "input" in metadata:
        shape = "x".join(map(str, metadata["input"]["shape"]))
        yield f"input {shape}, {metadata.get('classes', '?')} classes, weights from {metadata.get('source', '?')}"
    for alias, name in (metadata.get("ties") or {}).items():
        yield f"tied: {alias} is {name}"
    if dropped := metadata.get("dropped"):
        yield f"not stored, never read at inference: {', '.join(dropped)}"


def _row(entry: codec.Entry, packed: codec.Packed) -> tuple[str, ...]:
    from clipq_ray import codec

    name, levels, nonzeros = entry.name, "", ""
    tensor = packed.tensors.get(entry.name)
    if entry.members:
        others = len(entry.members) - len(packed.norms) * len(codec.norm_names(""))
        name = f"({len(packed.norms)} folded batch norms, {others} other vectors)"
    if isinstance(tensor, codec.CodedLayer):
        levels = str(tensor.levels.size)
        nonzeros = f"{100 * int((tensor.codes != 0).sum()) / max(entry.elements, 1):.1f}"
    shape = "x".join(str(size) for size in entry.shape) or "scalar"
    return (
        name,
        shape,
        entry.coder,
        levels,
        nonzeros,
        f"{entry.bytes:,}",
        f"{8 * entry.bytes / max(entry.elements, 1):.2f}",
    )


def _totals(
    coded: Sequence[codec.Entry], entries: Sequence[codec.Entry], elements: int, size: int
) -> Iterator[str]:
    layers = sum(entry.bytes for entry in coded)
    rest = sum(entry.bytes for entry in entries) - layers
    weights = sum(entry.elements for entry in coded)
    yield f"{len(coded)} layers: {weights:,} weights in {layers:,} bytes, {8 * layers / max(weights, 1):.3f} bits/weight"
    others = sum(len(entry.tensors) for entry in entries) - len(coded)
    yield f"{others} other tensors: {rest:,} bytes; header and index: {size - layers - rest:,} bytes"
    yield f"file: {4 * elements:,} bytes before, {size:,} bytes now, ratio {4 * elements / size:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows in columns: the first three to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column < _LEFT_COLUMNS else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _packed(uri: str) -> tuple[bytes, str]:
    """The bytes of the packed network at a file's or a committed run's URI, and where they lie."""
    from clipq_ray import loading

    data = loading.read_file(uri)
    return data, uri if loading.file_at(uri) else f"{uri.rstrip('/')}/{MODEL}"


def _checks(uri: str) -> Iterator[tuple[str, list[str], bool]]:
    """What there is to verify at a URI, one after the other: its name, its problems, and whether it is a fleet."""
    from clipq_ray import loading

    if file := loading.file_at(uri):
        yield uri, verify_clq(file[0].read(file[1]), uri), False
        return
    store = Store(uri)
    if store.exists(MANIFEST):
        if store.uri.rpartition("/")[2].startswith("fleet="):
            yield from _fleet_checks(store)
        else:
            yield uri, verify(store), False
        return
    runs, several = committed(store), fleets(store)
    for fleet in several:
        yield fleet.uri, verify_fleet(fleet, store), True
    if not runs and not several:
        raise StorageError(
            f"expected a .clq file, a run directory or a storage with committed runs, got none at {uri}; check the URI"
        )
    for run in runs:
        yield run.store.uri, verify(run.store), False


def _fleet_checks(fleet: Store) -> Iterator[tuple[str, list[str], bool]]:
    """A fleet, and each of its runs that is there."""
    storage = Store(fleet.uri.rpartition("/")[0])
    yield fleet.uri, verify_fleet(fleet, storage), True
    for one in runs_of(fleet, storage):
        if one.store.exists(MANIFEST):
            yield one.store.uri, verify(one.store), False


if __name__ == "__main__":
    sys.exit(main())
