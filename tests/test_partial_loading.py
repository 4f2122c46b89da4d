"""Some tensors of a file on object storage: only their bytes travel, and damage is still named."""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

from clipq_ray import codec, load_state_dict
from clipq_ray.errors import ArtifactError, StorageError
from clipq_ray.storage import Store

pytest_plugins = ["s3_server"]

SHAPE = (512, 512, 3, 3)


def packed() -> codec.Packed:
    random = np.random.default_rng(0)
    levels = np.array([-0.5, 0, 0.5, 1], np.float32)
    layers = {
        name: codec.CodedLayer.from_quantized(random.integers(-1, 3, shape).astype(np.int16), levels, 1)
        for name, shape in {"large.weight": SHAPE, "small.weight": (10, 4)}.items()
    }
    scale, shift = (codec.on_grid(random.normal(size=8), 1.0, 16) for _ in range(2))
    assert scale is not None
    assert shift is not None
    return codec.Packed({"ties": {"alias.weight": "small.weight"}}, {**layers, "bn.weight": scale, "bn.bias": shift}, ("bn",))  # fmt: skip


@contextlib.contextmanager
def counting(endpoint: str) -> Iterator[tuple[str, list[int]]]:
    """A relay on loopback before `endpoint`: its own endpoint, and the bytes that came back through it."""
    target = urlsplit(endpoint)
    received: list[int] = []

    def pump(source: socket.socket, sink: socket.socket, count: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if count:
                    received.append(len(data))
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((str(target.hostname), int(target.port or 80)))
                for pair, count in (((client, server), False), ((server, client), True)):
                    threading.Thread(target=pump, args=(*pair, count), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", received
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def remote(s3_uri: str) -> str:
    data = codec.encode(packed())
    assert len(data) > 400_000
    Store(s3_uri).write("model.clq", data)
    return f"{s3_uri}/model.clq"


@pytest.mark.parametrize("names", [["small.weight"], ["bn.bias", "bn.running_var"], ["alias.weight"]])
def test_a_small_layer_comes_without_the_large_one(
    names: list[str], remote: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_state_dict(remote)
    with counting(s3_server) as (endpoint, received):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        found = load_state_dict(remote, names)
    assert list(found) == names
    assert all(torch.equal(found[name], expected[name]) for name in names)
    # the first range may be longer than the header, and answers have headers of their own
    assert 0 < sum(received) < 20_000


def test_the_large_layer_alone_is_the_same_as_in_the_whole(remote: str) -> None:
    assert torch.equal(
        load_state_dict(remote, ["large.weight"])["large.weight"], load_state_dict(remote)["large.weight"]
    )


def test_damage_elsewhere_does_not_matter_and_damage_here_is_named(tmp_path: Path) -> None:
    data = bytearray(codec.encode(packed()))
    entries = {entry.name: entry for entry in codec.entries(bytes(data))}
    data[entries["large.weight"].offset + 100] ^= 1
    path = tmp_path / "model.clq"
    path.write_bytes(data)
    assert load_state_dict(path, ["small.weight"])["small.weight"].shape == (10, 4)
    with pytest.raises(ArtifactError, match=r"large\.weight.*checksum"):
        load_state_dict(path, ["large.weight"])
    with pytest.raises(ArtifactError, match="nope"):
        load_state_dict(path, ["nope"])


def test_a_file_that_lost_its_end_is_refused_before_anything_else_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.clq"
    path.write_bytes(codec.encode(packed())[:-1])
    with pytest.raises(ArtifactError, match=r"expected a \.clq file of"):
        load_state_dict(path, ["small.weight"])
    with pytest.raises(StorageError):
        load_state_dict(tmp_path / "other.clq", ["small.weight"])


@contextlib.contextmanager
def plain_server(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Python's own server of files, which knows no ranges: its address, and the ranges that it was asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers.get("Range", ""))
            super().do_GET()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_a_server_that_knows_no_ranges_sends_too_much_and_that_is_no_damage(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http:// with it")
    path = tmp_path / "model.clq"
    path.write_bytes(codec.encode(packed()))
    names = ["small.weight", "bn.bias", "large.weight"]
    expected = load_state_dict(path, names)
    with plain_server(tmp_path) as (address, asked):
        found = load_state_dict(f"{address}/model.clq?signature=1", names)
        assert Store(address).read_range("model.clq", 5, 25) == path.read_bytes()[5:25]
    assert any(asked), "no range was asked for"
    assert all(torch.equal(found[name], expected[name]) for name in names)
