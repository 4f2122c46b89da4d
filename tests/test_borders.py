"""The borders of the design hold in the tree: where Ray is imported, what an import costs, what is never called."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import clipq_ray

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "clipq_ray").rglob("*.py"))
JOBS = sorted((ROOT / "jobs").glob("*.py"))
TRAINING = {
    "finetune",
    "search",
    "operator",
    "source",
    "work",
    "pipeline",
    "packing",
    "results",
    "cluster",
    "api",
    "report",
}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def called(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file, by the text of what is called."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", [*PACKAGE, *JOBS], ids=lambda path: str(path.relative_to(ROOT)))
def test_ray_is_imported_under_cluster_only_and_that_only_by_the_interface(path: Path) -> None:
    found = set(imports(path))
    if path.parent.name != "cluster":
        assert not {name for name in found if name.split(".")[0] == "ray"}
    if path.name not in ("api.py", "on_ray.py"):
        assert not {name for name in found if name.startswith("clipq_ray.cluster.on_ray")}


@pytest.mark.parametrize("path", [*PACKAGE, *JOBS], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_evaluates_text_or_interpolates_quantiles(path: Path) -> None:
    for name, call in called(path):
        last = name.split(".")[-1]
        assert name not in ("eval", "exec", "compile"), ast.unparse(call)
        assert name.split(".")[0] not in ("pickle", "cloudpickle", "dill", "marshal", "joblib"), ast.unparse(
            call
        )
        assert last not in ("quantile", "nanquantile"), ast.unparse(call)
        assert name != "yaml.load", ast.unparse(call)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load":
            assert given.get("weights_only") == "True", ast.unparse(call)
        if name in ("np.load", "numpy.load"):
            assert given.get("allow_pickle", "False") == "False", ast.unparse(call)
        assert name != "torch.save", ast.unparse(call)


def test_these_checks_see_what_they_forbid(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(
        "def f():\n    from ray import tune\n    import ray.train\n    return torch.quantile(x, 0.5)\n"
    )
    assert set(imports(path)) == {"ray.tune", "ray.train"}
    assert [name for name, _ in called(path)] == ["torch.quantile"]


def modules_after(code: str) -> set[str]:
    """Names of the modules in a fresh process, where Ray cannot be imported, after `code`."""
    program = f"import sys, json; sys.modules['ray'] = None; {code}; print(json.dumps(sorted(sys.modules)))"
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120, cwd=ROOT
    )
    return set(json.loads(ended.stdout.splitlines()[-1]))


def test_importing_the_package_imports_nothing_heavy() -> None:
    found = modules_after("import clipq_ray")
    assert not found & {"torch", "numpy", "pyarrow", "sklearn", "pydantic"}
    assert {name for name in found if name.startswith("clipq_ray")} == {"clipq_ray"}


def test_loading_imports_neither_ray_nor_training_code() -> None:
    file = ROOT / "bench" / "records" / "resnet20-cifar10.clq"
    found = modules_after(
        f"import clipq_ray; clipq_ray.load({str(file)!r}); clipq_ray.load_state_dict({str(file)!r})"
    )
    own = {name.split(".")[1] for name in found if name.startswith("clipq_ray.")}
    assert not own & TRAINING
    assert not {name for name in found if name.split(".")[0] in ("bayes_opt", "sklearn", "tune")}


def test_the_public_names_are_sorted_and_all_there() -> None:
    assert clipq_ray.__all__ == sorted(clipq_ray.__all__)
    assert dir(clipq_ray) == clipq_ray.__all__
    for name in clipq_ray.__all__:
        assert callable(getattr(clipq_ray, name))
        assert getattr(clipq_ray, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = clipq_ray.nonsense
