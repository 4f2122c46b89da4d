"""`make bench-fleet`: a fleet of 100 small networks on digits, by the real job on Ray on this machine, watched from outside.

The job runs as anyone would start it (`jobs/compress.py --fleet`), on an S3 server on loopback unless `--storage` names another place. Each time that
networks are through, the driver's resident memory and open files are noted. When the job has ended: what it left in temporary folders and in the
storage beside finished stages, runs and the fleet. A storage of one's own makes it resumable: what is committed is not made again, and rows are of the
submission that made most.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.record import RESULTS, ROOT, Row, table, write
from clipq_ray.data import open_data
from clipq_ray.storage import Store

SAMPLES = RESULTS / "fleet-samples.json"
SIZE = 8  # pixels of an input
FIRST = 20  # networks after which the driver should have what it needs
POLL_SECONDS = 3.0


class Small(nn.Module):
    """Two or three convolutions and a linear layer for images (n, 3, 8, 8)."""

    def __init__(self, width: int = 8, depth: int = 2, num_classes: int = 10) -> None:
        super().__init__()
        widths = [3, *(width * (1 + place) for place in range(depth))]
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in itertools.pairwise(widths)
        )
        self.head = nn.Linear(widths[-1] * 4, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores (n, num_classes)."""
        for layer in self.layers:
            images = torch.relu(layer(images))
        scores: torch.Tensor = self.head(nn.functional.adaptive_avg_pool2d(images, 2).flatten(1))
        return scores


@dataclass(frozen=True)
class Sample:
    """The driver when `networks` had been verified by this submission."""

    networks: int
    seconds: float
    rss_mib: float
    files: int


def shape(number: int) -> dict[str, int]:
    """Network `number` of the fleet: no two are the same."""
    return {"width": 4 + number // 2, "depth": 1 + number % 2}


def fleet(folder: Path, networks: int, storage: str) -> Path:
    """A fleet file, with weights that know the digits a little."""
    data = open_data("digits", input_shape=(3, SIZE, SIZE)).train
    images, labels = data.batch(torch.arange(len(data)), None)
    torch.set_num_threads(1)
    entries = []
    for number in range(networks):
        torch.manual_seed(number)
        model = Small(**shape(number))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for rows in torch.randperm(1024).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
        path = folder / f"{number:03d}.safetensors"
        save_file(model.state_dict(), path)
        entries.append(
            {"model": "bench.fleet:Small", "name": f"n{number:03d}", "model_args": shape(number), "weights": str(path)}
        )  # fmt: skip
    defaults = {
        "data": "digits", "input_size": SIZE, "storage": storage, "epochs": 1, "warmup_epochs": 0.1, "batch_size": 64, "control": "never",
        "search_evaluations": 4, "search_start": 3, "search_images": 100, "target_ratio": 4, "rounds": 1,
    }  # fmt: skip
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump({"name": "soak", "defaults": defaults, "models": entries}))
    return path


@contextmanager
def bucket(given: str | None) -> Iterator[tuple[str, dict[str, str]]]:
    """A storage and the environment that finds it."""
    if given is not None:
        yield given, {}
        return
    sys.path.insert(0, str(ROOT / "tests"))
    from s3_server import environment, make_bucket, serving  # type: ignore[import-not-found]

    with serving() as address:
        yield f"s3://{make_bucket(address)}/fleet", environment(address)


def committed(storage: Store) -> int:
    """Runs that are committed."""
    return sum(
        re.fullmatch(r"model=[^/]+/run=[^/]+/manifest.json", name) is not None for name in objects(storage)
    )


def sampled(process: subprocess.Popen[bytes], log: Path) -> list[Sample]:
    """Until the job ends; `log` is what it writes. Not counted in the storage, whose lists would take longer and longer from the same machine."""
    started, found = time.monotonic(), list[Sample]()
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        made = log.read_text(encoding="utf-8").count(" verify: done ")
        if made <= (found[-1].networks if found else 0):
            continue
        place = Path(f"/proc/{process.pid}")
        try:
            status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
            files = len(list((place / "fd").iterdir()))
            rss = int(status["VmRSS"].split()[0]) / 1024
        except (OSError, KeyError):  # it has ended
            break
        found.append(Sample(made, time.monotonic() - started, rss, files))
        print(f"{made} networks, {found[-1].seconds:.0f} s, {rss:.0f} MiB, {files} files", flush=True)
    return found


def left_in(folder: Path) -> list[str]:
    """Files in a temporary folder."""
    return [
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() or path.is_symlink()
    ]


def left_in_storage(storage: Store) -> list[str]:
    """Objects that only work under way needs: claims, checkpoints, unfinished groups, unfinished writes."""
    words = ("/_work/", "/claim-", "/partial-", "/error.json", "/.clipq-")
    return [name for name in objects(storage) if any(word in f"/{name}" for word in words)]


def objects(storage: Store) -> list[str]:
    """All objects of a storage, unfinished ones too."""
    if storage.local is not None:
        return left_in(storage.local)
    import fsspec

    protocol, _, path = storage.uri.partition("://")
    found = fsspec.filesystem(protocol, skip_instance_cache=True).find(path)
    return [name.removeprefix(path.rstrip("/") + "/") for name in found]


def growth(samples: Sequence[Sample], what: str) -> float:
    """What a straight line through the samples from `FIRST` on gains to the last."""
    late = [one for one in samples if one.networks >= FIRST]
    networks, values = [one.networks for one in late], [float(getattr(one, what)) for one in late]
    return statistics.linear_regression(networks, values).slope * (networks[-1] - networks[0])


def rows(samples: Sequence[Sample], made: int, code: int, leftovers: Sequence[Sequence[str]]) -> list[Row]:
    """What is claimed of a soak."""
    late = [one for one in samples if one.networks >= FIRST]
    middle = min(late, key=lambda one: abs(one.networks - (late[0].networks + late[-1].networks) / 2))
    first, second = (
        (end.seconds - start.seconds) / (end.networks - start.networks)
        for start, end in ((late[0], middle), (middle, late[-1]))
    )
    temporary, stored = (len(one) for one in leftovers)
    return [
        Row("fleet/soak/networks", made, "committed", goal=100, better="higher"),
        Row("fleet/soak/exit_code", code, "", goal=0),
        Row("fleet/soak/driver_memory_growth", 100 * growth(samples, "rss_mib") / late[0].rss_mib, f"% from network {FIRST}", goal=5, n=len(late)),
        Row("fleet/soak/driver_memory", late[-1].rss_mib, "MiB at the end"),
        Row("fleet/soak/driver_files_growth", growth(samples, "files"), f"files from network {FIRST}", goal=5, n=len(late)),
        Row("fleet/soak/driver_files", late[-1].files, "open files at the end"),
        Row("fleet/soak/temporary_files_left", temporary, "files", goal=0),
        Row("fleet/soak/objects_left", stored, "objects that only work under way needs", goal=0),
        Row("fleet/soak/second_half_over_first", second / first, "time per network", goal=1.1, n=len(late)),
        Row("fleet/soak/seconds", samples[-1].seconds, "s from start to the last commit"),
    ]  # fmt: skip


def main() -> int:
    """All rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--storage", help="where the runs go; default: an S3 server of its own")
    parser.add_argument(
        "--engine",
        choices=("ray", "local"),
        default="ray",
        help="local: all in the driver, without Ray; not stored",
    )
    parser.add_argument("--networks", type=int, default=100, help="of the fleet (default: %(default)s)")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        tempfile.TemporaryDirectory(prefix="soak-") as temporary,
        bucket(given.storage) as (uri, found),
    ):
        os.environ.update(found)
        storage = Store(uri)
        path = fleet(Path(folder), given.networks, uri)
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": temporary, "RAY_TMPDIR": temporary,
        }  # fmt: skip
        command = [
            sys.executable, str(ROOT / "jobs" / "compress.py"), f"--fleet={path}", f"--engine={given.engine}",
        ]  # fmt: skip
        log = Path(folder) / "log"
        with log.open("wb") as written:
            process = subprocess.Popen(
                command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=written
            )
            samples = sampled(process, log)
            code = process.wait()
        made = committed(storage)
        if code:
            print(log.read_text(encoding="utf-8")[-2000:], file=sys.stderr)
        leftovers = (left_in(Path(temporary)), left_in_storage(storage))
    if given.engine == "local":
        print(table(rows(samples, made, code, leftovers)))
        print("left:", *leftovers[0][:20], *leftovers[1][:20], sep="\n  ")
        return code
    earlier: list[Any] = []
    if given.storage and SAMPLES.exists():
        earlier = json.loads(SAMPLES.read_text(encoding="utf-8"))
    submissions = [*earlier, [asdict(one) for one in samples]]
    SAMPLES.write_text(json.dumps(submissions) + "\n", encoding="utf-8")
    longest = [Sample(**one) for one in max(submissions, key=len)]
    notes = {
        "left": {"temporary": leftovers[0][:20], "storage": leftovers[1][:20]},
        "networks": given.networks,
    }
    print(f"stored in {write('fleet', rows(longest, made, code, leftovers), notes=notes)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
