"""One set of options for command line, YAML file and Python: each shown in the help, each spelled right or refused."""

from __future__ import annotations

import io
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

from clipq_ray import console, options
from clipq_ray.config import Config, make
from clipq_ray.errors import ConfigError, RunError


def parsed(arguments: list[str]) -> Config:
    """The configuration of the one network that is named."""
    (config,) = options.parse_all(arguments, "about").configs
    return config


@pytest.fixture(scope="module")
def shown() -> str:
    """What --help prints, on one line."""
    text = io.StringIO()
    with redirect_stdout(text), pytest.raises(SystemExit) as ended:
        parsed(["--help"])
    assert ended.value.code == 0
    return " ".join(text.getvalue().split())


def test_help_shows_every_option_with_its_text_and_default(shown: str) -> None:
    for name, field in Config.model_fields.items():
        option, text = "--" + name.replace("_", "-"), field.description or ""
        assert option in shown
        # argparse breaks lines at hyphens too
        assert text.replace(" ", "") in shown.replace(" ", ""), option
        default = field.get_default(call_default_factory=True)
        if default not in (None, (), {}):
            assert f"{text}(default:{default})".replace(" ", "") in shown.replace(" ", ""), option


def test_help_is_in_sections(shown: str) -> None:
    found = [
        shown.index(f" {title}: --") for title in ("network", "data", "search", "fine-tuning", "machines")
    ]
    assert found == sorted(found)
    assert shown.index(" search: --search-images") < shown.index(" fine-tuning: --epochs")


def test_help_shows_a_default_with_any_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPQ_STORAGE", "s3://bucket/100%done")
    text = io.StringIO()
    with redirect_stdout(text), pytest.raises(SystemExit):
        parsed(["--help"])
    assert "s3://bucket/100%done" in text.getvalue()


def test_the_defaults_of_the_command_line_are_those_of_the_configuration() -> None:
    assert parsed([]) == make()


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--epochs", "3"], "epochs", 3),
        (["--learning-rate", "1e-3"], "learning_rate", 1e-3),
        (["--target-ratio=20"], "target_ratio", 20.0),
        (["--keep", "fc.*, conv1.weight"], "keep", ("fc.*", "conv1.weight")),
        (["--mean", "0.5,0.4,0.3"], "mean", (0.5, 0.4, 0.3)),
        (["--model-args", '{"num_classes": 7}'], "model_args", {"num_classes": 7}),
        (["--force"], "force", True),
        (["--no-force"], "force", False),
        (["--engine", "local"], "engine", "local"),
    ],
)
def test_values_arrive_with_their_types(arguments: list[str], name: str, value: Any) -> None:
    assert getattr(parsed(arguments), name) == value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epoch", "3"], "did you mean --epochs"),
        (["--targetratio", "3"], "did you mean --target-ratio"),
        (["--qqqq", "3"], "see --help"),
        (["stray"], "'stray'"),
        (["--epochs"], "--epochs"),
        (["--epochs", "three"], "--epochs"),
        (["--force=perhaps"], "--force"),
        (["--model-args", "{broken"], "expected JSON"),
        (["--model-args", '{"depth": NaN}'], "expected JSON"),
        (["--mean", "a,b,c"], "--mean"),
        (["--engine", "spark"], "--engine"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_names_the_option(arguments: list[str], words: str) -> None:
    with refused(ConfigError, match=re.escape(words)):
        parsed(arguments)


def written(folder: Path, text: str) -> list[str]:
    path = folder / "options.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


def test_the_command_line_goes_before_the_file_and_the_file_before_the_default(tmp_path: Path) -> None:
    config = written(tmp_path, "epochs: 3\nseed: 4\nforce: true\n")
    found = parsed([*config, "--seed", "5", "--no-force"])
    assert (found.epochs, found.seed, found.force) == (3, 5, False)
    assert found.batch_size == make().batch_size
    assert parsed(["--seed", "5", *config]) == parsed([*config, "--seed", "5"]).model_copy(
        update={"force": True}
    )


def test_a_file_may_hold_lists_objects_and_names_with_hyphens(tmp_path: Path) -> None:
    text = "target-ratio: 20\nkeep: [fc.*, conv1.weight]\nmodel_args: {num_classes: 7}\nmean: [0.5]\n"
    found = parsed(written(tmp_path, text))
    assert (found.target_ratio, found.keep, found.model_args) == (
        20.0,
        ("fc.*", "conv1.weight"),
        {"num_classes": 7},
    )
    assert found.mean == (0.5,)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "epoch: 3\n",
            "unknown option 'epoch'; did you mean --epochs or --rung-epochs or --round-epochs? (in '{path}')",
        ),
        ("epochs: 0\n", "--epochs: expected greater than or equal to 1, got 0 (in '{path}')"),
        ("target_ratio: 3\ntradeoff: 1\n", "expected one intent"),
        ("- a\n- b\n", "'name: value'"),
        ("epochs\n", "'name: value'"),
        (
            "epochs: [\n",
            "expected YAML in '{path}', got line 2, column 1: expected the node content, but found '<stream end>'",
        ),
        ("name: 2026-02-30\n", "expected YAML"),
        ("max-drop: 1\nepochs: 3\nmax_drop: 2\n", "got max_drop again in line 3"),
        ("!!python/object/apply:os.getcwd []\n", "expected YAML"),
    ],
)
def test_a_wrong_file_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    arguments = written(tmp_path, text)
    with refused(ConfigError, match=re.escape(words.replace("{path}", arguments[-1]))):
        parsed(arguments)


def test_what_is_wrong_on_the_command_line_is_not_said_of_the_file(tmp_path: Path) -> None:
    with refused(ConfigError, match=r"got 'none'$"):
        parsed([*written(tmp_path, "epochs: 0\n"), "--epochs", "none"])


def test_the_recipes_are_valid() -> None:
    recipes = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        parsed(["--config", str(recipe)])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("expected a,\n got b"), 2, "job: expected a, got b\n"),
        (RunError("it diverged"), 1, "job: it diverged\n"),
        (KeyboardInterrupt(), 130, "job: interrupted; run the same command again to continue\n"),
    ],
)
def test_an_error_ends_the_job_with_one_line_and_its_code(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["job"])

    def main(_: list[str]) -> int:
        raise error

    assert console.run("job", main) == code
    assert capsys.readouterr().err == line


def test_an_intent_of_the_command_line_replaces_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("target_ratio: 20\nepochs: 3\n")
    found = parsed(["--config", str(path), "--max-drop", "1"])
    assert (found.max_drop, found.target_ratio, found.epochs) == (1.0, None, 3)


def test_every_model_gets_the_same_options() -> None:
    found = options.parse_all(["--model", "resnet50", "--epochs", "3", "--model", "vgg16"], "")
    assert (found.name, found.configs) == (
        None,
        (make(model="resnet50", epochs=3), make(model="vgg16", epochs=3)),
    )


def test_a_fleet_names_its_networks_itself(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("name: a\nmodels: [{model: lenet5}]\n")
    for option in ("--model", "--name"):
        with pytest.raises(ConfigError, match=f"expected its file to name the .*, got {option} as well"):
            options.parse_all(["--fleet", str(path), option, "lenet5"], "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "3", "--epochs", "5"],
        ["--epochs=3", "--epochs=3"],
        ["--model-args", "{}", "--model-args", "{}"],
        ["--engine", "ray", "--engine", "local"],
        ["--force", "--no-force"],
        ["--config", "/a.yaml", "--config", "/b.yaml"],
        ["--fleet", "/a.yaml", "--fleet", "/b.yaml"],
    ],
)
def test_an_option_that_is_given_twice_is_refused_by_name_in_one_line(arguments: list[str]) -> None:
    name = arguments[0].split("=")[0]
    with refused(ConfigError, match=f"^{name}: expected it once on the command line, got it again"):
        parsed(arguments)


@pytest.mark.parametrize("name", ["keep", "groups"])
def test_a_list_that_is_given_again_grows_and_takes_the_place_of_the_files(name: str, tmp_path: Path) -> None:
    file = written(tmp_path, f"{name}: fc2.*\n")
    found = parsed([*file, f"--{name}", "conv1.*,fc1.*", f"--{name}=conv2.*"])
    assert getattr(found, name) == ("conv1.*", "fc1.*", "conv2.*")
    assert getattr(parsed([*file, f"--{name}="]), name) == ()


@pytest.mark.parametrize("option", ["--config", "--fleet"])
def test_a_file_without_a_name_is_no_file(option: str) -> None:
    """Of a shell's variable that is not set: the job would go on without its recipe."""
    with refused(ConfigError, match=f"{option}: expected a readable YAML file, got ''"):
        parsed([option, ""])


def test_a_list_of_words_may_be_one_text_in_a_file(tmp_path: Path) -> None:
    found = parsed(written(tmp_path, "groups: blocks\nkeep: fc.*, conv1.weight\nmean: 0\nstd: '0.3'\n"))
    assert (found.groups, found.keep) == (("blocks",), ("fc.*", "conv1.weight"))
    assert (found.mean, found.std) == ((0.0,), (0.3,))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "resnet50"], "--model: expected different networks, got resnet50 twice"),
        (["--name", "best"], "--name: expected one --model with it, got 2"),
        (["--weights", "s3://b/w.pt"], "--weights: expected one --model with it, got 2"),
        (["--model-args", '{"num_classes": 7}'], "--model-args: expected one --model with it, got 2"),
    ],
)
def test_options_of_one_network_are_refused_for_several(arguments: list[str], words: str) -> None:
    second = [] if arguments[0] == "--model" else ["--model", "vgg16"]
    with pytest.raises(ConfigError, match=words):
        options.parse_all(["--model", "resnet50", *second, *arguments], "")


def test_a_mistake_of_the_command_line_is_said_once_and_not_of_the_lines_of_a_fleet(tmp_path: Path) -> None:
    path, config = tmp_path / "f.yaml", tmp_path / "c.yaml"
    path.write_text("name: f\ndefaults: {epochs: 3}\nmodels:\n  - model: lenet5\n  - model: lenet_300_100\n")
    with refused(ConfigError, match=r"^--epochs: expected greater than or equal to 1, got '0'$"):
        options.parse_all(["--fleet", str(path), "--epochs", "0"], "")
    config.write_text("epoch: 3\n")
    with refused(ConfigError, match=rf"^unknown option 'epoch'; did you mean --epochs.*\(in '{config}'\)$"):
        options.parse_all(["--fleet", str(path), "--config", str(config)], "")
