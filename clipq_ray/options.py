"""The command line of a configuration: every field of `Config` is one option, and `--config FILE` holds the same ones as YAML.

argparse, since its errors can be one line with exit code 2; the generators that were tried (tyro, pydantic-settings) print boxes or
tracebacks for a value out of range. Precedence: command line, then file, then default. An option stands once on a command line, as in a
file: of two the user would not know which one counts. `--model`, `--keep` and `--groups` may be repeated, since they name several.
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from clipq_ray import problems
from clipq_ray.config import Config, checked
from clipq_ray.consistency import INTENTS
from clipq_ray.console import OneLineParser, json_object, refuse_again
from clipq_ray.errors import ConfigError
from clipq_ray.fleet.file import Fleet, parsed, read

_SECTIONS = {
    "model": "network", "data": "data", "storage": "where results lie", "max_drop": "what is asked for, and the way there", "profile": "the file",
    "search_images": "search", "epochs": "fine-tuning", "expect_top1_percent": "guards", "engine": "machines",
}  # fmt: skip
"""The titles in the help, each before the option that it begins with."""

_REPEATED = ("model", "keep", "groups")
"""Options that may be given again: each adds to those before."""


class _SwitchOnce(argparse.BooleanOptionalAction):
    """`--force` or `--no-force`, one of them, once."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, *given: Any, **named: Any) -> None:
        refuse_again(self.dest, hasattr(namespace, self.dest))  # defaults are suppressed
        super().__call__(parser, namespace, *given, **named)


def parser(description: str) -> OneLineParser:
    """The parser for `Config`; options keep the fields' order, help shows unit and default."""
    result = OneLineParser(
        usage="%(prog)s [--model NAME ... | --config FILE | --fleet FILE] [options]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML file that holds the same options, e.g. target_ratio: 20",
    )
    result.add_argument(
        "--fleet",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML file that names many networks with their options, see clipq_ray/fleet/file.py; options of the command line take the place of its defaults",
    )
    section: argparse._ArgumentGroup | None = None
    for name, field in Config.model_fields.items():
        if name in _SECTIONS:
            section = result.add_argument_group(_SECTIONS[name])
        _add(section or result, name, field)
    return result


def _add(result: argparse._ActionsContainer, name: str, field: FieldInfo) -> None:
    option = "--" + name.replace("_", "-")
    default = field.get_default(call_default_factory=True)
    shown = "" if default in (None, (), {}) else f" (default: {default})"
    text = ((field.description or "") + shown).replace("%", "%%")  # argparse takes one for a format
    if field.annotation is bool:
        result.add_argument(option, action=_SwitchOnce, default=argparse.SUPPRESS, help=text)
        return
    kinds = set(typing.get_args(field.annotation)) or {field.annotation}
    choices = (
        typing.get_args(field.annotation) if typing.get_origin(field.annotation) is typing.Literal else None
    )
    metavar = "|".join(choices) if choices else _metavar(kinds)
    action = "append" if name in _REPEATED else "store"
    result.add_argument(option, metavar=metavar, action=action, default=argparse.SUPPRESS, help=text)


def _metavar(kinds: set[Any]) -> str:
    for kind, word in ((int, "N"), (float, "X"), (str, "TEXT")):
        if kind in kinds:
            return word
    return "LIST"


def parse_all(arguments: Sequence[str], description: str) -> Fleet:
    """The networks of a command line: of its `--fleet`, or one for each `--model`; `ConfigError` for anything wrong in it or in its files."""
    known, rest = parser(description).parse_known_args(list(arguments))
    if rest:
        raise ConfigError(problems.unknown(rest[0].removeprefix("--"), list(Config.model_fields)))
    given = vars(known)
    path, fleet = given.pop("config", None), given.pop("fleet", None)
    filed = {} if path is None else read_yaml(path)
    if any(name in given for name in INTENTS):  # an intent of the command line replaces that of the file
        filed = {name: value for name, value in filed.items() if name not in INTENTS}
    options = {**filed, **{name: _value(name, text) for name, text in given.items() if name != "model"}}
    if fleet is not None:
        if "model" in given or options.get("model"):
            raise ConfigError(
                "--fleet: expected its file to name the networks, got --model as well; leave one out"
            )
        if "name" in options:
            raise ConfigError(
                "--fleet: expected its file to name the results, got --name as well; leave one out"
            )
        places = {name: f" (in {path!r})" for name in filed if name not in given}
        said = [
            text + places.get(option or "", "") for option, text in checked(options)[1] if option in options
        ]
        if said:
            raise ConfigError("; ".join(said))
        return read(fleet, options)
    if isinstance(filed.get("model"), tuple):
        raise ConfigError(
            "--config: expected the name of one network as model, got a list; use --fleet, or --model for each"
        )
    names = given.get("model") or [filed.get("model")]
    places = {name: f" (in {path!r})" for name in filed if name not in given}
    if len(names) > 1:
        return Fleet(None, tuple(_several(names, options, places)))
    return Fleet(None, (_made(options, places, names[0]),))


def _made(options: Mapping[str, Any], places: Mapping[str, str], model: str | None) -> Config:
    """The configuration; `ConfigError` says of a wrong option where it stands, by `places`, which the command line is without."""
    found, problems = checked({**options, **({"model": model} if model is not None else {})})
    if found is None:
        raise ConfigError("; ".join(text + places.get(option or "", "") for option, text in problems))
    return found


def _several(names: Sequence[str], options: Mapping[str, Any], places: Mapping[str, str]) -> list[Config]:
    """The same options for several networks, where they can be the same."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"--model: expected different networks, got {', '.join(twice)} twice; leave one out"
        )
    one = [name for name in ("name", "model_args") if options.get(name)]
    if options.get("weights") not in (None, "train", "torchvision", "random"):
        one.append("weights")
    if one:
        option = "--" + one[0].replace("_", "-")
        raise ConfigError(
            f"{option}: expected one --model with it, got {len(names)}; leave it out or use --fleet"
        )
    return [_made(options, places, name) for name in names]


def _value(name: str, text: Any) -> Any:
    """Lists and JSON objects from their text; the rest is converted by the configuration itself."""
    annotation = str(Config.model_fields[name].annotation)
    if name in _REPEATED:
        text = ",".join(text)
    if isinstance(text, str) and "tuple" in annotation:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if isinstance(text, str) and annotation.startswith("dict"):
        return json_object("--" + name.replace("_", "-"), text)
    return text


def _loaded(path: str, text: str) -> Any:
    """The content of a YAML file; `ConfigError` for an option that it says twice, of which YAML would take the last."""
    root, seen = yaml.compose(text, Loader=yaml.SafeLoader), set[str]()
    for key, _ in root.value if isinstance(root, yaml.MappingNode) else ():
        name = str(key.value).replace("-", "_")
        if name in seen:
            line = key.start_mark.line + 1
            raise ConfigError(
                f"--config: expected each option once in {path!r}, got {name} again in line {line}; leave one out"
            )
        seen.add(name)
    return yaml.safe_load(text)


def read_yaml(path: str) -> dict[str, Any]:
    """The options of a YAML file; unknown keys are refused by `make`."""
    content = parsed("--config", path, lambda text: _loaded(path, text))
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config: expected options as 'name: value' lines in {path!r}, got {type(content).__name__}"
        )
    return {str(key).replace("-", "_"): tuple(v) if isinstance(v, list) else v for key, v in content.items()}
