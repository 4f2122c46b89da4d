"""NNCodec's entropy coder and zstd, for `bench/codec.py`: runs in `.venv-nncodec` (codec_peers.txt) and imports nothing of ours.

    python codec_peers.py CODES.npz     arrays `network|number`, int8, symbols signed around zero

A line of JSON comes in, one goes out: {"network": N, "do": "best"} finds NNCodec's best settings and remembers them for {"do": "pass"}, which
codes the network once and gives seconds; {"do": "zstd"} gives zstd's bytes. The first line out states versions. Bytes are those of the
coder's stream alone, a stream for every layer, without NNCodec's own headers (names, shapes: about 20 to 40 bytes per layer), and every
stream is decoded and compared. Scan in blocks (scan_order 1 to 4) is left out: on the table's networks it took 0.3 to 2.3 % more, and orders
above 1 did not decode all layers. Dependent quantization and temporal contexts do not apply to given symbols.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import sys
import sysconfig
import time
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard
from nncodec.extensions import deepCABAC

Symbols = npt.NDArray[np.int32]
NO_HISTORY = (deepCABAC.HdspMode.AlwaysOff, np.zeros(2, np.int8))
SCAN_ORDER = 0


class Settings(NamedTuple):
    """What its encoder lets one choose for given symbols; a profile of 1 is the second edition, which row_skip and codebook need."""

    unary_length: int
    param_opt: int
    profile: int
    row_skip: int
    codebook: int


GRID = [
    Settings(unary, param_opt, *tools)
    for unary, param_opt, tools in itertools.product(
        (1, 2, 4, 8, 10, 11, 16), (1, 0), ((1, 1, 1), (1, 0, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0))
    )
]


def _book(symbols: Symbols, settings: Settings) -> tuple[int, int]:
    """Size of the codebook and where its zero is; 0 symbols without one."""
    if not settings.codebook:
        return 0, 0
    low, high = min(int(symbols.min()), 0), max(int(symbols.max()), 0)
    return high - low + 1, -low


def encode(symbols: Symbols, settings: Settings) -> npt.NDArray[np.uint8]:
    """The stream of one layer."""
    skipped = np.zeros(len(symbols), np.int32)
    if settings.row_skip:
        skipped[:] = ~symbols.reshape(len(symbols), -1).any(axis=1)
    coder = deepCABAC.Encoder()
    coder.initCtxModels(settings.unary_length, settings.param_opt)
    coder.encodeLayer(
        symbols, 0, SCAN_ORDER, settings.profile, 0, settings.row_skip, skipped, *NO_HISTORY, *_book(symbols, settings)
    )  # fmt: skip
    stream: npt.NDArray[np.uint8] = coder.finish()
    return stream


def decode(
    stream: npt.NDArray[np.uint8], shape: tuple[int, ...], settings: Settings, book: tuple[int, int]
) -> Symbols:
    """The mirror of `encode`."""
    coder = deepCABAC.Decoder()
    coder.setStream(stream)
    coder.initCtxModels(settings.unary_length)
    symbols = np.zeros(shape, np.int32)
    coder.decodeLayer(symbols, 0, SCAN_ORDER, settings.profile, 0, *NO_HISTORY, *book)
    coder.finish()
    return symbols


def best(network: list[Symbols]) -> dict[str, Any]:
    """The settings that take the fewest bytes for the network, and the bytes if every layer had its own."""
    sizes = {}
    for settings in GRID:
        streams = [encode(symbols, settings) for symbols in network]
        for symbols, stream in zip(network, streams, strict=True):
            found = decode(stream, symbols.shape, settings, _book(symbols, settings))
            np.testing.assert_array_equal(found, symbols)
        sizes[settings] = [len(stream) for stream in streams]
    chosen = min(sizes, key=lambda settings: sum(sizes[settings]))
    return {
        "bytes": sum(sizes[chosen]),
        "by_layer": sum(map(min, zip(*sizes.values(), strict=True))),
        "settings": {**chosen._asdict(), "scan_order": SCAN_ORDER, "dependent_quantization": 0},
    }


def one_pass(network: list[Symbols], settings: Settings) -> dict[str, float]:
    """Seconds to encode and to decode all layers once, on one core."""
    books = [_book(symbols, settings) for symbols in network]
    began = time.perf_counter()
    streams = [encode(symbols, settings) for symbols in network]
    between = time.perf_counter()
    for symbols, stream, book in zip(network, streams, books, strict=True):
        decode(stream, symbols.shape, settings, book)
    return {"encoding": between - began, "decoding": time.perf_counter() - between}


def zstd(network: list[Symbols]) -> dict[str, Any]:
    """Bytes of `zstd -19` over the int8 symbols of all layers in one frame, which serves it better than a frame per layer."""
    data = b"".join(symbols.astype(np.int8).tobytes() for symbols in network)
    packed = zstandard.ZstdCompressor(level=19, write_content_size=False).compress(data)
    return {"bytes": len(packed)}


def main() -> None:
    """Answer until nobody asks."""
    networks: dict[str, list[Symbols]] = {}
    with np.load(sys.argv[1]) as stored:
        for key in stored.files:
            networks.setdefault(key.partition("|")[0], []).append(stored[key].astype(np.int32))
    names = ("nncodec", "zstandard", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    flags = sysconfig.get_config_var("CFLAGS") or ""
    print(json.dumps({"versions": versions, "compiled_with": flags}), flush=True)
    chosen: dict[str, Settings] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        name = asked["network"]
        if asked["do"] == "best":
            answer = best(networks[name])
            chosen[name] = Settings(*(answer["settings"][field] for field in Settings._fields))
        elif asked["do"] == "zstd":
            answer = zstd(networks[name])
        else:
            answer = one_pass(networks[name], chosen[name])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
