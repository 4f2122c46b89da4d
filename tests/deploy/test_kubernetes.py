"""The Kubernetes files: fields of KubeRay's CRDs (list and version in `kuberay_fields.json`), Kueue's needs, the token, and nothing that is open; the image."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FIELDS = json.loads(Path(__file__).with_name("kuberay_fields.json").read_text(encoding="utf-8"))
FILES = ["cluster.yaml", "job.yaml"]


def read(name: str) -> dict[str, Any]:
    text = (ROOT / "deploy" / "kubernetes" / name).read_text(encoding="utf-8")
    document: dict[str, Any] = yaml.safe_load(text.replace(" @", " "))
    return document


def cluster(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["spec"].get("rayClusterSpec", document["spec"])
    return found


@pytest.mark.parametrize("name", FILES)
def test_fields_are_those_of_the_custom_resources(name: str) -> None:
    document = read(name)
    assert document["apiVersion"] == "ray.io/v1"
    spec = cluster(document)
    assert set(document["spec"]) <= set(FIELDS[document["kind"]])
    assert set(spec) <= set(FIELDS["RayCluster"])
    assert set(spec["headGroupSpec"]) <= set(FIELDS["HeadGroupSpec"])
    assert set(spec["authOptions"]) <= set(FIELDS["AuthOptions"])
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= set(FIELDS["WorkerGroupSpec"])
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    if document["kind"] == "RayJob":
        assert document["spec"]["submissionMode"] in FIELDS["submissionMode"]


@pytest.mark.parametrize("name", FILES)
def test_kueue_may_queue_them(name: str) -> None:
    """A queue label, a fixed size, requests on every container, and a job that gives its cluster back."""
    document = read(name)
    assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    spec = cluster(document)
    assert spec["enableInTreeAutoscaling"] is False
    for template in templates(document):
        for container in template["spec"]["containers"]:
            assert set(container["resources"]["requests"]) >= {"cpu", "memory"}
    if document["kind"] == "RayJob":
        assert document["spec"]["shutdownAfterJobFinishes"] is True
        assert "suspend" not in document["spec"], "Kueue sets it"


def templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster(document)
    pods = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    if document["kind"] == "RayJob":
        pods.append(document["spec"]["submitterPodTemplate"])
    return pods


@pytest.mark.parametrize("name", FILES)
def test_they_are_closed_and_run_what_is_installed(name: str) -> None:
    document = read(name)
    spec = cluster(document)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned is not None
    assert spec["rayVersion"] == pinned[1]
    for template in templates(document):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert ":" in container["image"]
            assert not container["image"].endswith(":latest")
            names = {one["name"] for one in container.get("env", [])}
            assert not any("KEY" in one or "SECRET" in one for one in names), "instance roles, no keys"
    head = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {"CLIPQ_STORAGE", "CLIPQ_DATA"} <= {one["name"] for one in head["env"]}


def test_the_policy_selects_the_pods_of_both_files() -> None:
    policy = read("network.yaml")
    label = policy["spec"]["podSelector"]["matchLabels"]["app"]
    for name in FILES:
        for template in templates(read(name))[:2]:
            assert template["metadata"]["labels"]["app"] == label


def test_the_job_s_command_is_the_one_of_the_readme() -> None:
    assert f"-- {read('job.yaml')['spec']['entrypoint']}\n" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_edited_is_no_yaml(name: str) -> None:
    with pytest.raises(yaml.scanner.ScannerError, match="cannot start any token"):
        yaml.safe_load((ROOT / "deploy" / "kubernetes" / name).read_text(encoding="utf-8"))


def test_the_image_copies_what_is_there_and_runs_as_a_user() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1] if not word.startswith("--")]  # fmt: skip
    assert {"clipq_ray", "jobs", "recipes", "constraints.txt"} <= set(copied)
    assert all((ROOT / word).exists() for word in copied)
    assert "USER ray" in lines
    assert any("--constraint constraints.txt" in line for line in lines)
    assert not any(":latest" in line for line in lines)
