"""Cluster files: not edited, Ray refuses them with the line; edited, they are what Ray's schema and AWS's API (moto) take; every key says why it is there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

pytest_plugins = ["s3_server"]
ray = pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]
FILES = ["cluster.yaml", "deploy/on-premises.yaml"]


def edited(name: str) -> dict[str, Any]:
    """The file as a user has edited it: without the marks."""
    text = (ROOT / name).read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(text.replace(" @", " ").replace("[@", "["))
    return config


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` takes it: with Ray's defaults, through Ray's schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    result: dict[str, Any] = prepare_config(config)
    validate_config(result)
    return result


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_edited_is_refused_with_the_line_before_anything_is_started(
    name: str, tmp_path: Path
) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines, 1) if re.match(r"[^#]*[: \[]@", line))
    ended = subprocess.run(
        [Path(sys.executable).with_name("ray"), "up", "--yes", name], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "HOME": str(tmp_path), "RAY_TMPDIR": str(tmp_path)},
    )  # fmt: skip
    said = ended.stdout + ended.stderr
    assert ended.returncode == 1
    assert f"line {first}, column" in said
    assert lines[first - 1].strip() in said
    assert "Checking" not in said, "it went on"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FILES)
def test_an_edited_file_passes_ray_s_schema_with_its_own_fields(name: str) -> None:
    config = edited(name)
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    assert set(config) <= set(schema["properties"])
    assert prepared(config)["cluster_name"] == "clipq"


@pytest.mark.parametrize("name", FILES)
def test_every_key_says_why_it_is_there(name: str) -> None:
    """By a comment above it, behind it, or as the first line of the group that it opens; paths and commands are under a key that has one."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if not re.match(r" {0,6}[A-Za-z_]+:", line):
            continue
        above, group = lines[number - 1].lstrip(), line.endswith(":") and lines[number + 1].lstrip()
        commented = above.startswith("#") or " # " in line or (group and group.startswith("#"))
        assert commented, f"{name}, line {number + 1}: {line}"


@pytest.mark.parametrize("name", FILES)
def test_nodes_start_with_a_token_and_the_dashboard_on_loopback(name: str) -> None:
    config = edited(name)
    (head,) = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    (worker,) = [line for line in config["worker_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--num-cpus=0" in head
    assert "source deploy/node.sh head &&" in head
    assert "source deploy/node.sh worker &&" in worker
    assert "~/.ray/auth_token" in config["cluster_synced_files"]
    assert "RAY_AUTH_MODE=token" in (ROOT / "deploy" / "node.sh").read_text()


@pytest.mark.parametrize("name", FILES)
def test_what_is_mounted_is_all_that_a_job_imports_and_small(name: str) -> None:
    mounts = edited(name)["file_mounts"]
    assert {str(Path(remote).relative_to("~/clipq_ray")) for remote in mounts} == set(mounts.values())
    for wanted in ("clipq_ray", "jobs", "deploy", "recipes", "constraints.txt"):
        assert wanted in mounts.values()
    size = sum(
        path.stat().st_size
        for local in mounts.values()
        for path in ([ROOT / local] if (ROOT / local).is_file() else (ROOT / local).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    )
    assert size < 5_000_000


def test_the_working_directory_of_a_job_is_far_below_ray_s_limit(tmp_path: Path) -> None:
    """`ray job submit --working-dir .` packs what .gitignore and .rayignore leave."""
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    found = get_excludes_from_ignore_files(ROOT, include_gitignore=True)
    for name in (".venv/bin/python", ".git/config", "runs/model=a/run=b/manifest.json", "tests/hosts.py", "bench/record.py"):  # fmt: skip
        assert any(excluded(ROOT / name.split("/")[0]) or excluded(ROOT / name) for excluded in found), name
    for name in ("clipq_ray/config.py", "jobs/compress.py", "recipes/demo.yaml"):
        assert not any(excluded(ROOT / name) for excluded in found), name


@pytest.fixture
def aws(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """An account as deploy/aws.yaml leaves it, in moto; the names of its security groups and instances are read through the client."""
    from s3_server import environment

    for name, value in environment(s3_server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    monkeypatch.setenv("HOME", str(tmp_path))
    parameters = {"Bucket": f"clipq-{os.urandom(6).hex()}", "SshFrom": "203.0.113.7/32"}
    boto3.client("cloudformation", region_name="us-west-2").create_stack(
        StackName="clipq", TemplateBody=(ROOT / "deploy" / "aws.yaml").read_text(), Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
    )  # fmt: skip
    yield boto3.client("ec2", region_name="us-west-2")
    boto3.client("cloudformation", region_name="us-west-2").delete_stack(StackName="clipq")


@pytest.mark.slow
def test_aws_takes_what_the_cluster_file_asks_for_and_nothing_is_open(aws: Any) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = edited("cluster.yaml")
    image = aws.describe_images()["Images"][0]["ImageId"]
    for kind in config["available_node_types"].values():
        assert kind["node_config"]["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/ami/")
        kind["node_config"]["ImageId"] = image  # moto does not resolve aliases
    config = AWSNodeProvider.bootstrap_config(
        AWSNodeProvider.fillout_available_node_types_resources(prepared(config))
    )
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name in ("head", "gpu_spot", "gpu_on_demand"):
        kind = config["available_node_types"][name]
        node = {**config["head_node"], **kind["node_config"]} if name == "head" else kind["node_config"]
        assert provider.create_node(node, {"ray-node-type": name, "ray-user-node-type": name}, 1)
    found = [one for page in aws.describe_instances()["Reservations"] for one in page["Instances"]]
    mine = {tag["Value"]: one for one in found for tag in one["Tags"] if tag["Key"] == "ray-user-node-type"}
    assert mine["head"]["InstanceType"] == "m7i.2xlarge"
    assert mine["gpu_spot"]["InstanceLifecycle"] == "spot"
    assert "InstanceLifecycle" not in mine["gpu_on_demand"]
    assert mine["head"]["IamInstanceProfile"]["Arn"].endswith("/clipq-head")
    assert mine["gpu_spot"]["IamInstanceProfile"]["Arn"].endswith("/clipq-worker")
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    groups = {group["GroupId"] for one in mine.values() for group in one["SecurityGroups"]}
    (group,) = aws.describe_security_groups(GroupIds=sorted(groups))["SecurityGroups"]
    assert group["GroupName"] == "clipq-nodes"
    rules = [(rule["IpProtocol"], rule["IpRanges"], rule["UserIdGroupPairs"]) for rule in group["IpPermissions"]]  # fmt: skip
    assert next(rule for rule in rules if rule[0] == "tcp")[1][0]["CidrIp"] == "203.0.113.7/32"
    assert all(pair["GroupId"] == group["GroupId"] for rule in rules for pair in rule[2])
    assert "0.0.0.0/0" not in json.dumps(group["IpPermissions"])


def test_spot_comes_first_and_on_demand_when_spot_has_failed() -> None:
    """By Ray's own scheduler, with the kinds of cluster.yaml."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    config = AutoscalingConfig(edited("cluster.yaml"), skip_content_hash=True)
    kinds = config.get_node_type_configs()

    def launched(recoverable: dict[str, float]) -> list[str]:
        request = SchedulingRequest(
            node_type_configs=kinds, disable_launch_config_check=True, max_num_nodes=9, resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"GPU": 1, "CPU": 1})]),
            recoverable_resource_availabilities=recoverable,
        )  # fmt: skip
        reply = ResourceDemandScheduler(None).schedule(request)
        return [one.instance_type for one in reply.to_launch for _ in range(one.count)]

    assert launched({}) == ["gpu_spot"]
    assert launched({"gpu_spot": 0.0}) == ["gpu_on_demand"]
