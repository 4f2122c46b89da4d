"""Cluster files: not edited, Ray refuses them with the line; edited, they are what Ray's schema and AWS's API (moto) take; every key says why it is there."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
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


@pytest.mark.parametrize(
    ("addresses", "taken"),
    [("203.0.113.7/32", True), ("10.0.0.0/8", True), ("0.0.0.0/0", False), ("203.0.113.7/0", False), ("0.0.0.0/1", False), ("1.2.3.4/33", False)],
)  # fmt: skip
def test_ssh_is_open_to_some_addresses_at_most(addresses: str, taken: bool) -> None:
    text = (ROOT / "deploy" / "aws.yaml").read_text()
    (found,) = re.findall(r"SshFrom:\n    Type: String\n    AllowedPattern: (.*)\n", text)
    assert bool(re.fullmatch(yaml.safe_load(found), addresses)) is taken


@pytest.fixture
def aws(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """An account as deploy/aws.yaml leaves it, in moto, with a second network whose subnets come first; security groups and instances are read through the client."""
    from s3_server import environment

    for name, value in environment(s3_server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    monkeypatch.setenv("HOME", str(tmp_path))
    ec2 = boto3.client("ec2", region_name="us-west-2")
    (vpc,) = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    parameters = {"Bucket": f"clipq-{os.urandom(6).hex()}", "SshFrom": "203.0.113.7/32", "Vpc": vpc["VpcId"]}
    cloudformation = boto3.client("cloudformation", region_name="us-west-2")
    cloudformation.create_stack(
        StackName="clipq", TemplateBody=(ROOT / "deploy" / "aws.yaml").read_text(), Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
    )  # fmt: skip
    yield ec2
    cloudformation.delete_stack(StackName="clipq")


def told(name: str) -> str:
    """An output of the stack, as its user copies it."""
    (stack,) = boto3.client("cloudformation", region_name="us-west-2").describe_stacks(StackName="clipq")[
        "Stacks"
    ]
    return next(one["OutputValue"] for one in stack["Outputs"] if one["OutputKey"] == name)


@pytest.fixture
def cluster(aws: Any) -> tuple[Any, dict[str, Any]]:
    """Node provider and configuration as `ray up` makes them of the edited cluster.yaml."""
    from ray.autoscaler._private.providers import _get_node_provider_cls

    config = edited("cluster.yaml")
    image = aws.describe_images()["Images"][0]["ImageId"]
    for kind in config["available_node_types"].values():
        assert kind["node_config"]["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/ami/")
        kind["node_config"]["ImageId"] = image  # moto does not resolve aliases
        kind["node_config"]["SecurityGroupIds"] = [told("SecurityGroup")]
    made = _get_node_provider_cls(config["provider"])
    config = made.bootstrap_config(made.fillout_available_node_types_resources(prepared(config)))
    return made(config["provider"], config["cluster_name"]), config


def started(aws: Any, cluster: tuple[Any, dict[str, Any]], kind: str) -> dict[str, Any]:
    """The instance that becomes of one node of `kind`, as EC2 describes it."""
    provider, config = cluster
    node = config["available_node_types"][kind]["node_config"]
    node = {**config["head_node"], **node} if kind == "head" else node
    (made,) = provider.create_node(node, {"ray-node-type": kind, "ray-user-node-type": kind}, 1)
    (page,) = aws.describe_instances(InstanceIds=[made])["Reservations"]
    instance: dict[str, Any] = page["Instances"][0]
    return instance


@pytest.mark.slow
def test_aws_takes_what_the_cluster_file_asks_for_and_nothing_is_open(
    aws: Any, cluster: tuple[Any, dict[str, Any]]
) -> None:
    mine = {kind: started(aws, cluster, kind) for kind in ("head", "gpu")}
    assert mine["head"]["InstanceType"] == "m7i.2xlarge"
    assert "InstanceLifecycle" not in mine["head"]
    assert mine["gpu"]["InstanceLifecycle"] == "spot"
    assert mine["head"]["IamInstanceProfile"]["Arn"].endswith("/clipq-head-us-west-2")
    assert mine["gpu"]["IamInstanceProfile"]["Arn"].endswith("/clipq-worker-us-west-2")
    assert cluster[1]["available_node_types"]["head"]["resources"]["CPU"] == 0
    groups = {group["GroupId"] for one in mine.values() for group in one["SecurityGroups"]}
    (group,) = aws.describe_security_groups(GroupIds=sorted(groups))["SecurityGroups"]
    assert group["GroupName"] == "clipq-nodes"
    rules = [(rule["IpProtocol"], rule["IpRanges"], rule["UserIdGroupPairs"]) for rule in group["IpPermissions"]]  # fmt: skip
    assert next(rule for rule in rules if rule[0] == "tcp")[1][0]["CidrIp"] == "203.0.113.7/32"
    assert all(pair["GroupId"] == group["GroupId"] for rule in rules for pair in rule[2])
    assert "0.0.0.0/0" not in json.dumps(group["IpPermissions"])


@pytest.fixture
def another_network(aws: Any) -> Any:
    """A network with a public subnet in the first zone, as another team of the account may have."""
    vpc = aws.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    subnet = aws.create_subnet(VpcId=vpc, CidrBlock="10.9.1.0/24", AvailabilityZone="us-west-2a")["Subnet"][
        "SubnetId"
    ]
    aws.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": True})
    yield vpc
    aws.delete_subnet(SubnetId=subnet)
    aws.delete_vpc(VpcId=vpc)


@pytest.mark.slow
def test_nodes_come_into_the_network_of_the_closed_group_whatever_others_there_are(
    aws: Any, another_network: str, cluster: tuple[Any, dict[str, Any]]
) -> None:
    for kind in ("head", "gpu"):
        assert started(aws, cluster, kind)["VpcId"] != another_network
    groups = aws.describe_security_groups()["SecurityGroups"]
    open_to_all = [one["GroupName"] for one in groups if "0.0.0.0/0" in json.dumps(one["IpPermissions"])]
    assert open_to_all == []


@contextlib.contextmanager
def refusing(
    provider: Any, code: str, when: Callable[[dict[str, Any]], bool]
) -> Iterator[list[dict[str, Any]]]:
    """EC2 refuses requests for which `when` holds with `code` inside; gives the list into which those go. Ray keeps its clients for the whole process."""
    from botocore.exceptions import ClientError

    refused: list[dict[str, Any]] = []

    def answer(params: dict[str, Any], **_: Any) -> None:
        if when(params):
            refused.append(params)
            raise ClientError({"Error": {"Code": code, "Message": "none left"}}, "RunInstances")

    events, name = provider.ec2_fail_fast.meta.client.meta.events, "provide-client-params.ec2.RunInstances"
    events.register(name, answer)
    try:
        yield refused
    finally:
        events.unregister(name, answer)


@pytest.mark.slow
def test_a_worker_comes_on_demand_where_no_zone_has_spot_and_the_next_one_tries_spot_again(
    aws: Any, cluster: tuple[Any, dict[str, Any]]
) -> None:
    with refusing(
        cluster[0], "InsufficientInstanceCapacity", lambda asked: "InstanceMarketOptions" in asked
    ) as refused:
        instance = started(aws, cluster, "gpu")
    assert "InstanceLifecycle" not in instance
    assert (instance["InstanceType"], instance["SecurityGroups"][0]["GroupName"]) == (
        "g6.2xlarge",
        "clipq-nodes",
    )
    assert len({asked["SubnetId"] for asked in refused}) > 1, "other zones were not asked for spot"
    assert started(aws, cluster, "gpu")["InstanceLifecycle"] == "spot"


@pytest.mark.slow
def test_what_is_wrong_on_demand_too_is_said_by_its_name(
    aws: Any, cluster: tuple[Any, dict[str, Any]]
) -> None:
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    with refusing(cluster[0], "VcpuLimitExceeded", lambda asked: True) as refused:
        for kind in ("gpu", "head"):
            with pytest.raises(NodeLaunchException, match="VcpuLimitExceeded"):
                started(aws, cluster, kind)
    assert {"InstanceMarketOptions" in asked for asked in refused} == {True, False}


def allowed(policy: dict[str, Any], action: str, resource: str, context: dict[str, str]) -> bool:
    """What IAM says of a request, as far as the policy of the head goes: statements that allow, with `StringEquals` alone as condition."""
    for one in policy["Statement"]:
        listed = {
            key: one[key] if isinstance(one[key], list) else [one[key]] for key in ("Action", "Resource")
        }
        condition = dict(one.get("Condition", {}))
        wanted = condition.pop("StringEquals", {})
        assert one["Effect"] == "Allow"
        assert not condition
        if (
            any(fnmatch.fnmatchcase(action, pattern) for pattern in listed["Action"])
            and any(fnmatch.fnmatchcase(resource, pattern) for pattern in listed["Resource"])
            and all(
                context.get(key) in (values if isinstance(values, list) else [values])
                for key, values in wanted.items()
            )
        ):
            return True
    return False


@pytest.mark.slow
def test_a_head_may_tag_and_end_the_nodes_of_its_cluster_and_no_other_instance(
    aws: Any, cluster: tuple[Any, dict[str, Any]]
) -> None:
    iam = boto3.client("iam", region_name="us-west-2")
    (role,) = [one["RoleName"] for one in iam.list_roles()["Roles"] if "HeadRole" in one["RoleName"]]
    said = iam.get_role_policy(RoleName=role, PolicyName="workers")["PolicyDocument"]
    policy = yaml.safe_load(str(said))  # moto has it as Python writes it
    node = started(aws, cluster, "gpu")
    assert node["InstanceId"] in cluster[0].non_terminated_nodes({})
    cluster[0].set_node_tags(node["InstanceId"], {"ray-node-status": "setting-up"})  # as the autoscaler does
    (page,) = aws.describe_instances(InstanceIds=[node["InstanceId"]])["Reservations"]
    tags = {f"ec2:ResourceTag/{one['Key']}": one["Value"] for one in page["Instances"][0]["Tags"]}
    assert tags["ec2:ResourceTag/ray-node-status"] == "setting-up"
    account = page["OwnerId"]
    (instance, volume) = (f"arn:aws:ec2:us-west-2:{account}:{kind}/x" for kind in ("instance", "volume"))
    foreign = {**tags, "ec2:ResourceTag/ray-cluster-name": "of-another-team"}
    for action in ("ec2:CreateTags", "ec2:TerminateInstances", "ec2:StopInstances"):
        assert allowed(policy, action, instance, tags)
        assert not allowed(policy, action, instance, foreign)
        assert not allowed(policy, action, instance, {})
        assert not allowed(policy, action, volume, {})
    for kind in (instance, volume):
        assert allowed(policy, "ec2:CreateTags", kind, {"ec2:CreateAction": "RunInstances"})
        assert not allowed(policy, "ec2:CreateTags", kind, {"ec2:CreateAction": "CreateVolume"})
    assert allowed(policy, "ec2:RunInstances", instance, {})


def test_what_ray_looks_up_is_all_there_although_a_provider_with_a_module_has_no_defaults() -> None:
    mine = edited("cluster.yaml")
    by_ray = {**mine, "provider": {**mine["provider"], "type": "aws"}}
    del by_ray["provider"]["module"]
    assert set(prepared(by_ray)) <= set(prepared(mine))


def test_the_provider_is_there_without_what_trains() -> None:
    """`ray up` imports it on a machine that has Ray, boto3 and the checkout."""
    code = "import sys, clipq_ray.cluster.spot; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"
