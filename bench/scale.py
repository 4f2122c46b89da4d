"""What grows with the number of networks: requests to the object storage, and what Tune needs per trial.

`python bench/scale.py`; the numbers are constants of docs/scale.md. Requests are counted by the access log of an S3 server on loopback (moto), of whole jobs on
LeNet-5 and the digits, as differences: one job more evaluations, one more epochs. Not covered: speed, which is that of the GPUs (`ray_clipq_images_per_second`).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.record import ROOT, Row, row, write

_TRIALS = 200
_GROUPS = 5  # layers of LeNet-5


class Server:
    """An S3 server whose requests are counted."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "s3.log"
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=self._log.open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        limit = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", self._log.read_text())):
            if time.monotonic() > limit:
                raise SystemExit(f"scale: the S3 server did not start: {self._log.read_text()[-500:]}")
            time.sleep(0.1)
        self.environment = {
            "AWS_ENDPOINT_URL": found.group(), "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_CONFIG_FILE": "/dev/null", "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip

    def count(self) -> Counter[str]:
        """Requests so far, by method."""
        return Counter(re.findall(r'"(GET|PUT|POST|DELETE|HEAD) /', self._log.read_text()))

    def end(self) -> None:
        """Stop it."""
        self._process.terminate()
        self._process.wait()


def requests(server: Server, bucket: str, **changes: int) -> tuple[int, int]:
    """The writing and listing (PUT, POST, GET of lists are one price class) and the other requests of one job."""
    import boto3  # type: ignore[import-untyped]

    client = boto3.client("s3", endpoint_url=server.environment["AWS_ENDPOINT_URL"], region_name="us-east-1",
                          aws_access_key_id="testing", aws_secret_access_key="testing")  # fmt: skip
    client.create_bucket(Bucket=bucket)
    options = {
        "storage": f"s3://{bucket}/runs", "engine": "local", "weights": "random", "epochs": 2, "search_evaluations": 4, "search_start": 3,
        "search_stop_gain": 0, "search_images": 60, "target_ratio": 15, "rounds": 1, "batch_size": 64, "warmup_epochs": 0, "baseline_epochs": 9, **changes,
    }  # fmt: skip
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    before = server.count()
    ended = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "compress.py"), *words], env={**os.environ, **server.environment}, cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ended.returncode not in (0, 1):  # 1: a promise that random weights do not keep
        raise SystemExit(f"scale: {ended.stderr[-1000:]}")
    used = server.count()
    used.subtract(before)
    return used["PUT"] + used["POST"], used["GET"] + used["HEAD"] + used["DELETE"]


def storage_rows(folder: Path) -> list[Row]:
    """Requests per evaluation, per epoch, and of a job without either."""
    server = Server(folder)
    try:
        few = requests(server, "few")
        evaluations = requests(server, "evaluations", search_evaluations=8)
        epochs = requests(server, "epochs", epochs=6)
    finally:
        server.end()
    rows = []
    for place, kind in enumerate(("write", "read")):
        per_evaluation = (evaluations[place] - few[place]) / (4 * _GROUPS)
        per_epoch = (epochs[place] - few[place]) / 4
        rest = few[place] - per_evaluation * 4 * _GROUPS - per_epoch * 2
        rows += [
            Row(f"scale/s3/{kind}/per_evaluation", per_evaluation, "requests"),
            Row(f"scale/s3/{kind}/per_epoch", per_epoch, "requests"),
            Row(f"scale/s3/{kind}/rest_of_a_run", rest, "requests"),
        ]
    return rows


def tune_rows(folder: Path) -> list[Row]:
    """What Tune itself takes per trial that does nothing, with actors that are reused, and the size of its state."""
    import ray
    from ray import tune

    class Nothing(tune.Trainable):  # type: ignore[misc]
        def reset_config(self, new_config: dict[str, int]) -> bool:
            return True

        def step(self) -> dict[str, bool]:
            return {"done": True}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            pass

    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        started = time.monotonic()
        tune.Tuner(
            tune.with_resources(Nothing, {"CPU": 1}),
            param_space={"place": tune.grid_search(list(range(_TRIALS)))},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(name="scale", storage_path=str(folder), verbose=0),
        ).fit()
        seconds = time.monotonic() - started
    finally:
        ray.shutdown()
    state = sum(path.stat().st_size for path in (folder / "scale").glob("*state*.json"))
    return [
        row("scale/tune/seconds_per_trial", [seconds / _TRIALS], "s"),
        row("scale/tune/state_bytes_per_trial", [state / _TRIALS], "bytes"),
    ]


def main() -> int:
    """Both parts."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rows = storage_rows(Path(folder)) + tune_rows(Path(folder))
    write("scale", rows, notes={"trials": _TRIALS, "server": "moto"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
