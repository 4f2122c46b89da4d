"""From `ray up` to the result, on hosts of their own (`hosts.py`): the README's commands as they stand, what is refused, a job that is stopped and goes on,
a cable that is pulled and a host that dies in mid-run, and what is left in the end.

By `make test-cluster`, in the order of this file. One cluster for all: client and S3 server on one address, the head, and two workers of one CPU each.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from hosts import HOSTS, Bed, missing

pytest.importorskip("ray")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
ENDPOINT = f"http://{HOSTS['client']}:5000"
# a search of half a minute of one host: the other one's processes take seconds to start, on a busy machine ten and more, and shall still find work
OPTIONS = (
    "--model lenet5 --weights random --workers 2 --target-ratio 15 --rounds 1 --epochs 40 --batch-size 32 "
    "--learning-rate 0.01 --hold-size --control never --search-evaluations 40 --search-start 3 --search-images 1000"
)
LIMIT_SECONDS = 1200.0  # for any one thing; an idle machine of two cores needs a fraction of it for all
_WAIT = 2.0


def readme() -> list[str]:
    """The commands of the README from `ray up` to the job."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(
        r"(?:^    .*\n)*^    ray up cluster\.yaml.*\n(?:^    .*\n)+", text, flags=re.MULTILINE
    )
    return [line.strip().split("  #")[0].strip() for line in block.splitlines()]


def cluster_file() -> str:
    """deploy/on-premises.yaml as its user edits it, and what three hosts on one machine of two cores need."""
    text = (ROOT / "deploy" / "on-premises.yaml").read_text(encoding="utf-8")
    edits = {
        "@10.0.0.10": HOSTS["head"], "@10.0.0.11": HOSTS["worker1"], "@10.0.0.12": HOSTS["worker2"], "@ubuntu": "root", "@~/.ssh/": "~/.ssh/",
        "@s3://your-bucket/clipq": "s3://clipq/runs", "@s3://your-bucket/imagenet": "digits", "http://10.0.0.9:9000": ENDPOINT, "    # AWS_": "    AWS_",
        "--num-cpus=0 ": "--num-cpus=0 --object-store-memory=150000000 ",
        "--address=$RAY_HEAD_IP:6379": "--address=$RAY_HEAD_IP:6379 --num-cpus=1 --object-store-memory=150000000",
    }  # fmt: skip
    for before, after in edits.items():
        assert before in text
        text = text.replace(before, after)
    return text


class Cluster:
    """The hosts with Ray on them, as its user at the client sees it."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self._processes: list[subprocess.Popen[Any]] = []
        self._token = ""

    def prepare(self) -> None:
        """Hosts as their owner leaves them: the environment is installed, keys for the storage lie in the account's home."""
        for name in HOSTS:
            root = self.bed.folder / name / "root"
            environment = root / "clipq_ray" / ".venv"
            environment.mkdir(parents=True)
            for part in ("bin", "lib", "pyvenv.cfg"):
                (environment / part).symlink_to(self.bed.environment / part)
            shutil.copy(ROOT / "constraints.txt", environment)
            (root / ".aws").mkdir()
            lines = "".join(f"{key.lower()} = {value}\n" for key, value in KEYS.items() if key != "AWS_DEFAULT_REGION")  # fmt: skip
            (root / ".aws" / "credentials").write_text(f"[default]\n{lines}region = us-east-1\n")
        checkout = self.bed.folder / "client" / "root" / "checkout"
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in listed.stdout.split("\0"):
            if name and (ROOT / name).is_file():
                (checkout / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, checkout / name)
        for compiled in (ROOT / "clipq_ray").rglob(
            "__pycache__/*.nb[ic]"
        ):  # as on hosts that ran a job before
            for name in HOSTS:
                target = self.bed.folder / name / "root" / "clipq_ray" / compiled.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(compiled, target)
        (checkout / "cluster.yaml").write_text(cluster_file())
        self.start("python -m moto.server -H 0.0.0.0 -p 5000", "s3")
        self.until(lambda: self.s3("s3.create_bucket(Bucket='clipq')").returncode == 0, 60)

    def start(self, command: str, name: str) -> Path:
        """`command` at the client, in its checkout, left running; the file that holds what it says."""
        log = self.bed.folder / f"{name}.log"
        words = f"mkdir -p checkout && cd checkout && exec {command}"
        self._processes.append(self.bed.start("client", words, log, environment=KEYS))
        return log

    def end(self) -> None:
        """Whatever was left running at the client."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def run(
        self, command: str, *, token: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """`command` at the client, in its checkout, with what the README's line of the token gives a shell."""
        exports = f"{self._token}; " if token and self._token else ""
        return self.bed.run(
            "client", f"cd checkout && {exports}{command}", timeout=LIMIT_SECONDS, environment=environment
        )

    def take_token(self, command: str) -> None:
        """What the README's line prints, kept for later commands."""
        made = self.run(command.removeprefix('eval "$(').removesuffix(')"'))
        assert made.returncode == 0, made.stderr
        self._token = made.stdout.strip()

    def s3(self, statement: str) -> subprocess.CompletedProcess[str]:
        """One statement with a client of the S3 server, on the client."""
        code = f"import boto3; s3 = boto3.client('s3', endpoint_url='{ENDPOINT}'); {statement}"
        return self.bed.run("client", f'python -c "{code}"', environment=KEYS)

    def keys(self, prefix: str) -> list[str]:
        """The objects below a prefix."""
        listing = f"print('\\n'.join(o['Key'] for p in s3.get_paginator('list_objects_v2').paginate(Bucket='clipq', Prefix='{prefix}') for o in p.get('Contents', [])))"  # fmt: skip
        found = self.s3(listing)
        assert found.returncode == 0, found.stderr
        return found.stdout.split()

    def read(self, key: str) -> bytes:
        target = self.bed.folder / "object"
        assert self.s3(f"s3.download_file('clipq', '{key}', '{target}')").returncode == 0
        return target.read_bytes()

    def until(self, what: Callable[[], Any], seconds: float = LIMIT_SECONDS) -> Any:
        """What `what` gives as soon as it is true."""
        limit = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < limit, "it took too long"
            time.sleep(_WAIT)
        return found

    def get(self, path: str) -> Any:
        """What the job server says at `path`; None where it does not answer."""
        words = f'curl -s -f -m 20 -H "Authorization: Bearer $(cat $RAY_AUTH_TOKEN_PATH)" "http://localhost:8265{path}"'
        found = self.run(words)
        return json.loads(found.stdout) if found.returncode == 0 else None

    def alive(self) -> set[str]:
        """The hosts whose Ray the head holds for alive."""
        nodes = (self.get("/nodes?view=summary") or {}).get("data", {}).get("summary", [])
        up = [node for node in nodes if node["raylet"].get("state") == "ALIVE"]
        return {node.get("hostname") or node["raylet"]["nodeManagerHostname"] for node in up}

    def log(self, job: str) -> str:
        """What a job has said so far."""
        return self.run(f"ray job logs {job}").stdout

    def status(self, job: str) -> dict[str, Any]:
        """A job's details, by the job server; empty where it does not answer."""
        return self.get(f"/api/jobs/{job}") or {}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(f"no hosts on this machine: {why}")
    made = Cluster(Bed(tmp_path_factory.mktemp("hosts"), visible=[ROOT]))
    try:
        made.bed.up()
        made.prepare()
        yield made
    finally:
        made.end()
        made.bed.down()


def committed(cluster: Cluster, prefix: str) -> tuple[str, str]:
    """The one committed run below a prefix: its key and the hash of its network."""
    (manifest,) = [key for key in cluster.keys(f"{prefix}/") if re.fullmatch(rf"{prefix}/model=lenet5/run=[^/]+/manifest\.json", key)]  # fmt: skip
    document = json.loads(cluster.read(manifest))
    return manifest.rpartition("/")[0], document["files"]["model.clq"]["sha256"]


def searched_on(cluster: Cluster, prefix: str) -> set[str]:
    """The hosts that measured trials of the committed run below a prefix."""
    run, _ = committed(cluster, prefix)
    return set(pq.read_table(io.BytesIO(cluster.read(f"{run}/trials.parquet"))).to_pydict()["node"])


def test_a_cluster_comes_up_by_the_readme_and_its_job_runs_on_both_hosts(cluster: Cluster) -> None:
    up, dashboard, token, submit = readme()
    made = cluster.run(f"{up} --yes")  # there is no terminal to say yes at
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    cluster.start(dashboard, "dashboard")
    cluster.until(lambda: cluster.run("curl -s localhost:8265 >/dev/null").returncode == 0, 60)
    cluster.take_token(token)
    assert submit == "ray job submit -- python jobs/compress.py --model resnet50"
    ended = cluster.run(submit.replace("--model resnet50", OPTIONS))
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-1000:]
    lines = [line for line in ended.stdout.splitlines() if line.strip() and "cli.py" not in line]
    assert lines[-1] == "compress: exit code 0"
    assert any(re.match(r"\[\d+:\d\d\] search: .* of 200 steps", line) for line in lines), "no progress"
    assert searched_on(cluster, "runs") <= {"worker1", "worker2"}
    assert not [key for key in cluster.keys("runs/") if "/_work/" in key and "claim" in key]


def test_without_the_token_nothing_runs(cluster: Cluster) -> None:
    """Neither by the job server, nor by a node's agent, nor as a driver; and from other hosts the job server cannot be reached at all."""
    nothing = cluster.run("ray job submit -- touch /tmp/owned", token=False, RAY_API_SERVER_ADDRESS="http://localhost:8265", RAY_AUTH_MODE="disabled")  # fmt: skip
    assert nothing.returncode != 0
    assert "Unauthorized" in nothing.stdout + nothing.stderr
    wrong = {
        "RAY_API_SERVER_ADDRESS": "http://localhost:8265",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "f" * 64,
    }
    other = cluster.run("ray job submit -- touch /tmp/owned", token=False, **wrong)
    assert other.returncode != 0
    assert "Invalid authentication token" in other.stdout + other.stderr
    post = "curl -s -o /dev/null -w '%{http_code}' -X POST -H 'Content-Type: application/json' -d '{\"entrypoint\": \"touch /tmp/owned\"}'"
    assert cluster.run(f"{post} http://localhost:8265/api/jobs/", token=False).stdout == "401"
    for name in ("head", "worker1"):
        agent = f"http://{HOSTS[name]}:52365/api/job_agent/jobs/"
        assert cluster.run(f"{post} {agent}", token=False).stdout in ("401", "000"), "the agent took it"
    assert cluster.bed.run("worker1", f"curl -s -m 5 http://{HOSTS['head']}:8265").returncode == 7, (
        "not refused"
    )
    driver = cluster.run("python jobs/compress.py", token=False, RAY_ADDRESS=f"{HOSTS['head']}:6379", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="f" * 64, **KEYS)  # fmt: skip
    assert driver.returncode == 2
    assert any(
        line.startswith("compress: ") and "does not take this token" in line
        for line in driver.stderr.splitlines()
    )
    assert cluster.bed.run("head", "test -e /tmp/owned").returncode == 1
    assert cluster.bed.run("worker1", "test -e /tmp/owned").returncode == 1
    modes = cluster.bed.run("head", "stat -c %a ~/.ray/auth_token").stdout + cluster.bed.run("worker2", "stat -c %a ~/.ray/auth_token").stdout  # fmt: skip
    assert modes.split() == ["600", "600"]


def test_what_cannot_run_is_refused_at_once(cluster: Cluster) -> None:
    """No GPU, more workers than fit: one line with what is there, exit code 2 in the last line and in the job's details."""
    cases = (
        ("--device cuda", "expected a GPU in the cluster, got none (3 nodes with 2 CPUs and 0 GPUs"),
        ("--workers 3", "expected at most 2, which is what the cluster has room for, got 3"),
        (
            "--storage /tmp/runs",
            "expected a --storage that all 3 nodes see and may write to, but node worker1",
        ),
    )
    for option, words in cases:
        began = time.monotonic()
        ended = cluster.run(f"ray job submit --submission-id refused{option[-1]} -- python jobs/compress.py {option} --batch-size 32")  # fmt: skip
        assert ended.returncode == 1
        lines = [line for line in ended.stdout.splitlines() if line.startswith("compress: ")]
        assert words in lines[0]
        assert "compress: exit code 2" in lines
        assert cluster.status(f"refused{option[-1]}")["driver_exit_code"] == 2
        assert time.monotonic() - began < 120


def test_entry_point_resources_put_the_job_onto_a_worker(cluster: Cluster) -> None:
    """With the same code and variables there: on clusters whose head is small."""
    ended = cluster.run("ray job submit --submission-id there --entrypoint-num-cpus 1 -- python jobs/compress.py --dry-run")  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-2000:]
    assert "nothing was done" in ended.stdout
    address = cluster.status("there")["driver_agent_http_address"]
    assert any(HOSTS[name] in address for name in ("worker1", "worker2"))


def test_a_job_that_is_stopped_gives_its_run_back(cluster: Cluster) -> None:
    storage = "--storage s3://clipq/faults"
    cluster.run(f"ray job submit --no-wait --submission-id first --working-dir . -- python jobs/compress.py {OPTIONS} {storage}")  # fmt: skip
    cluster.until(
        lambda: [
            key for key in cluster.keys("faults/_stages/search-") if "/group-" in key or "/partial-" in key
        ]
    )
    assert [key for key in cluster.keys("faults/model=lenet5/") if "claim" in key]
    stopped = cluster.run("ray job stop first")
    assert stopped.returncode == 0
    assert cluster.status("first")["status"] == "STOPPED"
    lines = cluster.log("first").splitlines()
    assert "compress: stopped; run the same command again to continue" in lines, "\n".join(lines[-30:])
    assert "compress: exit code 143" in lines
    assert not [key for key in cluster.keys("faults/model=lenet5/") if "claim" in key]


def test_it_goes_on_through_a_pulled_cable_and_a_dead_host_to_the_same_bytes(cluster: Cluster) -> None:
    storage = "--storage s3://clipq/faults"
    cluster.run(f"ray job submit --no-wait --submission-id second --working-dir . -- python jobs/compress.py {OPTIONS} {storage}")  # fmt: skip

    def epoch() -> int:
        assert cluster.status("second").get("status", "RUNNING") in ("PENDING", "RUNNING"), cluster.log("second")[-3000:]  # fmt: skip
        kept = [
            re.search(r"/_work/finetune/\w+/epoch-(\d+)\.", key)
            for key in cluster.keys("faults/model=lenet5/")
        ]
        return max((int(one[1]) for one in kept if one), default=0)

    def workers(name: str) -> int:
        return int(cluster.bed.run(name, "ps -eo args | grep -c '^ray::.*TrainWorker'").stdout)

    # epochs alone say nothing: the job that was stopped may have left some
    cluster.until(lambda: epoch() >= 2 and workers("worker1") == workers("worker2") == 1)
    speeds = cluster.until(lambda: metrics(cluster, "ray_clipq_images_per_second"), 60)
    assert any('stage="finetune"' in line and float(line.split()[-1]) > 0 for line in speeds)
    assert sum(float(line.split()[-1]) for line in metrics(cluster, "ray_clipq_evaluations_total")) >= 80
    cluster.bed.cut("worker2")
    cluster.until(lambda: "worker2" not in cluster.alive())
    cluster.bed.mend("worker2")
    before = epoch()
    cluster.until(lambda: cluster.alive() >= {"worker1", "worker2"})
    cluster.until(
        lambda: epoch() >= min(before + 3, 38) or cluster.status("second").get("status") == "SUCCEEDED"
    )
    cluster.bed.kill("worker1")
    cluster.until(lambda: "worker1" not in cluster.alive())
    cluster.bed.back("worker1")
    cluster.until(lambda: cluster.status("second")["status"] not in ("PENDING", "RUNNING"))
    details = cluster.status("second")
    assert details["status"] == "SUCCEEDED", cluster.log("second")[-3000:]
    assert details["driver_exit_code"] == 0
    assert committed(cluster, "faults")[1] == committed(cluster, "runs")[1]
    assert cluster.until(lambda: metrics(cluster, "ray_clipq_bytes_saved_total"), 60), "a total of a job that has ended"  # fmt: skip
    assert searched_on(cluster, "faults") | searched_on(cluster, "runs") == {"worker1", "worker2"}, "a host was left no trial of two searches"  # fmt: skip


def metrics(cluster: Cluster, name: str) -> list[str]:
    """The samples of a metric, over all nodes, as Prometheus would read them."""
    found = cluster.bed.run("head", "cat /tmp/ray/prom_metrics_service_discovery.json")
    targets = {one for group in json.loads(found.stdout or "[]") for one in group["targets"]}
    pages = [
        cluster.bed.run("client", f"curl -s -m 5 http://{target}/metrics").stdout
        for target in sorted(targets)
    ]
    return [line for page in pages for line in page.splitlines() if line.startswith(f"{name}{{")]


def test_ray_down_and_ray_stop_end_it(cluster: Cluster) -> None:
    assert cluster.run("ray down --yes cluster.yaml", token=False).returncode == 0
    for name in ("worker1", "worker2"):
        words = f"ssh -o StrictHostKeyChecking=no root@{HOSTS[name]} '~/clipq_ray/.venv/bin/ray stop'"
        ended = cluster.run(words, token=False)
        assert ended.returncode == 0, ended.stderr
    left = "ps -eo args | grep -E '^ray::|raylet|gcs_server' | grep -v grep"
    for name in ("head", "worker1", "worker2"):
        cluster.until(functools.partial(_nothing, cluster, name, left), 60)


def _nothing(cluster: Cluster, name: str, command: str) -> bool:
    return cluster.bed.run(name, command).stdout == ""
