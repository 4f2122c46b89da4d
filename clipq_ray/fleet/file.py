"""A fleet file: many networks for one job, what they share, and limits; read whole, with every mistake and its line at once.

    name: night                       of the result, {storage}/fleet=night/
    defaults: {data: s3://..., epochs: 10, target_ratio: 15}
    limits: {trainings: 2, searches: 16}
    models:
      - {model: resnet50, priority: 5}
      - {model: resnet50, name: small50, target_ratio: 25, weights: s3://bucket/w.safetensors}
    ensembles:
      - {name: vote, members: [resnet50, small50]}

`defaults` and a network's own lines hold the job's options; the network's own count more. Not covered: running it (`pipeline`, `cluster`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError, SafeConstructor

from clipq_ray.config import INTENTS, Config, checked
from clipq_ray.errors import ConfigError, UserError
from clipq_ray.work import Source

_SECTIONS = ("name", "defaults", "limits", "models", "ensembles")
_LIMITS = {
    "trainings": "trainings",
    "searches": "search_parallel",
    "cpus": "limit_cpus",
    "gpus": "limit_gpus",
}
"""What a job may take of a cluster at a time, and the options that say the same."""
_OF_THE_JOB = ("dry_run", "engine", "storage", "force", "on_claim", *_LIMITS.values())
"""Options that are one for all networks of a job."""


@dataclass(frozen=True)
class Ensemble:
    """Networks that vote together, by the average of their probabilities."""

    name: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Fleet:
    """What a fleet file says, or a command line (then it has no name); `configs` with the highest priority first, and `priorities` of each."""

    name: str | None
    configs: tuple[Config, ...]
    ensembles: tuple[Ensemble, ...] = ()
    priorities: tuple[int, ...] = ()

    def sources(self) -> list[Source]:
        """The networks."""
        priorities = self.priorities or (0,) * len(self.configs)
        return [
            Source(config, priority=priority)
            for config, priority in zip(self.configs, priorities, strict=True)
        ]


def parsed(option: str, path: str, parse: Callable[[str], Any]) -> Any:
    """What `parse` makes of the YAML file that `option` names; `ConfigError` where it cannot be read."""
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option}: expected a readable YAML file, got {path!r} ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{option}: expected YAML in {path!r}, got {' '.join(str(error).split())}"
        ) from error


def read(path: str, options: Mapping[str, Any]) -> Fleet:
    """The fleet of the file at `path`; `options` of the command line take the place of its defaults. One `ConfigError` names all mistakes."""
    root = parsed("--fleet", path, lambda text: yaml.compose(text, Loader=yaml.SafeLoader))
    reading = _Reading()
    fleet = reading.fleet(root, options)
    if reading.mistakes:
        said = "; ".join(f"line {line}: {text}" for line, text in sorted(reading.mistakes))
        count = len(reading.mistakes)
        raise ConfigError(f"{path}: {count} mistake{'s' if count > 1 else ''}: {said}")
    assert fleet is not None
    return fleet


@dataclass
class _Part:
    """A mapping of the file: its values by key, the line of each key, and its own line."""

    line: int
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def at(self, key: str | None) -> int:
        return self.lines.get(key or "", self.line)


class _Reading:
    """Collects mistakes while a file is read."""

    def __init__(self) -> None:
        self.mistakes: list[tuple[int, str]] = []

    def say(self, line: int, text: str) -> None:
        self.mistakes.append((line, text))

    def part(self, node: yaml.Node | None, what: str) -> _Part:
        """A mapping; anything else is a mistake and taken as empty."""
        if not isinstance(node, yaml.MappingNode):
            line = node.start_mark.line + 1 if node else 1
            self.say(line, f"expected {what} as 'name: value' lines, got {_kind(node)}")
            return _Part(line)
        result = _Part(node.start_mark.line + 1)
        for key_node, value_node in node.value:
            key = str(key_node.value).replace("-", "_")
            line = key_node.start_mark.line + 1
            if key in result.values:
                self.say(line, f"{key}: is there twice in {what}; leave one out")
            result.values[key], result.lines[key] = value_node, line
        return result

    def known(self, part: _Part, names: tuple[str, ...], what: str) -> None:
        """Refuse keys that are none of `names`."""
        for key in part.values:
            if key not in names:
                self.say(part.at(key), f"unknown key {key!r} in {what}; expected {', '.join(names)}")

    def plain(self, part: _Part) -> _Part:
        """The values as Python's."""
        values: dict[str, Any] = {}
        for key, node in part.values.items():
            try:
                value = SafeConstructor().construct_object(node, deep=True)
            except ConstructorError as error:
                self.say(part.at(key), f"{key}: {' '.join(str(error.problem).split())}")
                continue
            values[key] = tuple(value) if isinstance(value, list) else value
        return _Part(part.line, values, part.lines)

    def each(self, node: yaml.Node | None, what: str, one: str) -> Iterator[_Part]:
        """The mappings of a list."""
        if node is None:
            return
        if not isinstance(node, yaml.SequenceNode):
            self.say(node.start_mark.line + 1, f"{what}: expected a list, got {_kind(node)}")
            return
        for entry in node.value:
            yield self.plain(self.part(entry, one))

    def fleet(self, root: yaml.Node | None, options: Mapping[str, Any]) -> Fleet | None:
        """The whole file."""
        top = self.part(root, "a fleet")
        self.known(top, _SECTIONS, "a fleet")
        sections = top.values
        name = self.plain(
            _Part(top.line, {k: v for k, v in sections.items() if k == "name"}, top.lines)
        ).values.get("name")
        if (
            not isinstance(name, str)
            or not name
            or set(name) & set("/=\\ \t\n")
            or name.startswith((".", "_"))
        ):
            self.say(top.at("name"), f"name: expected a name without spaces, '/' or '=', got {name!r}")
        defaults = (
            self.plain(self.part(sections["defaults"], "defaults")) if "defaults" in sections else _Part(1)
        )
        limited = self.limits(sections.get("limits"), defaults)
        configs = self.models(sections.get("models"), defaults, {**limited, **options})
        listed = sections.get("models")
        if listed is None or (isinstance(listed, yaml.SequenceNode) and not listed.value):
            self.say(top.at("models"), "models: expected at least one network, got none")
        names = {config.result_name: config for _, config in configs}
        ensembles = tuple(self.ensembles(sections.get("ensembles"), names))
        order = sorted(configs, key=lambda one: -one[0])
        if self.mistakes:
            return None
        priorities, networks = zip(*order, strict=True)
        return Fleet(str(name), networks, ensembles, priorities)

    def limits(self, node: yaml.Node | None, defaults: _Part) -> dict[str, int]:
        """The section `limits`, as options."""
        if node is None:
            return {}
        part = self.part(node, "limits")
        self.known(part, tuple(_LIMITS), "limits")
        part = self.plain(part)
        found = {}
        for key, option in _LIMITS.items():
            value = part.values.get(key)
            if key in part.values and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                self.say(part.at(key), f"{key}: expected a whole number of at least 1, got {value!r}")
            elif key in part.values and option in defaults.values:
                self.say(
                    part.at(key), f"{key}: is there twice, {option} in defaults says it too; leave one out"
                )
            elif isinstance(value, int):
                found[option] = value
        return found

    def models(
        self, node: yaml.Node | None, defaults: _Part, options: Mapping[str, Any]
    ) -> list[tuple[int, Config]]:
        """Priority and configuration of every network."""
        for key in ("name", "model"):
            if key in defaults.values:
                self.say(
                    defaults.at(key), f"{key}: expected with a network, got it in defaults; move it there"
                )
        found: list[tuple[int, Config]] = []
        lines: dict[str, int] = {}
        wrong_defaults: set[str] = set()
        for part in self.each(node, "models", "a network"):
            own = dict(part.values)
            priority = own.pop("priority", 0)
            if isinstance(priority, bool) or not isinstance(priority, int):
                self.say(part.at("priority"), f"priority: expected a whole number, got {priority!r}")
                priority = 0
            for key in _OF_THE_JOB:
                if key in own:
                    self.say(part.at(key), f"{key}: expected one for the whole fleet; move it to defaults")
            if "model" not in own:
                self.say(part.line, "model: expected the name of a network, got none")
            config, problems = checked(_merged(defaults.values, options, own))
            for option, text in problems:
                if option in own or option not in defaults.values:
                    self.say(part.at(option), text)
                elif option not in wrong_defaults:  # once, not for every network
                    wrong_defaults.add(option)
                    self.say(defaults.at(option), text)
            if config is None:
                continue
            try:
                Source(config).check()
            except UserError as error:
                self.say(part.at("model"), str(error))
            name = config.result_name
            if name in lines:
                self.say(
                    part.line,
                    f"expected names that differ, got {name!r} as in line {lines[name]}; give one of them a name",
                )
            lines[name] = part.line
            found.append((priority, config))
        return found

    def ensembles(self, node: yaml.Node | None, networks: Mapping[str, Config]) -> Iterator[Ensemble]:
        """The section `ensembles`."""
        seen: dict[str, int] = {}
        parts = list(self.each(node, "ensembles", "an ensemble"))
        names = {str(part.values.get("name")) for part in parts}
        for part in parts:
            self.known(part, ("name", "members"), "an ensemble")
            name, members = part.values.get("name"), part.values.get("members", ())
            if not isinstance(name, str) or not name or name in networks:
                self.say(part.at("name"), f"name: expected one that no network has, got {name!r}")
            if str(name) in seen:
                self.say(part.line, f"expected names that differ, got {name!r} as in line {seen[str(name)]}")
            seen[str(name)] = part.line
            if (
                not isinstance(members, tuple)
                or len(set(map(str, members))) < 2
                or len(set(map(str, members))) != len(members)
            ):
                self.say(
                    part.at("members"),
                    f"members: expected a list of at least two different networks, got {members!r}",
                )
                continue
            for member in map(str, members):
                if member in names and member not in networks:
                    self.say(
                        part.at("members"),
                        f"members: expected networks, got the ensemble {member!r}; name its members",
                    )
                elif member not in networks:
                    self.say(
                        part.at("members"),
                        f"members: expected names of networks in this fleet, got {member!r}",
                    )
            yield Ensemble(str(name), tuple(map(str, members)))


def _merged(
    defaults: Mapping[str, Any], options: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """A network's own lines before the command line before the defaults; an intent takes the place of a lesser one."""
    result: dict[str, Any] = {}
    for layer in (defaults, options, own):
        if any(layer.get(name) is not None for name in INTENTS):
            result = {name: value for name, value in result.items() if name not in INTENTS}
        result.update(layer)
    return result


def _kind(node: yaml.Node | None) -> str:
    if node is None:
        return "nothing"
    return {"MappingNode": "a mapping", "SequenceNode": "a list"}.get(type(node).__name__, repr(node.value))
