"""A fleet file: many networks for one job, what they share, and limits; read whole, with every mistake and its line at once.

    name: night                       of the result, {storage}/fleet=night/
    defaults: {data: s3://..., epochs: 10, target_ratio: 15}
    limits: {trainings: 2, searches: 16}
    models:
      - {model: resnet50, priority: 5}
      - {model: resnet50, name: small50, target_ratio: 25, weights: s3://bucket/w.safetensors}
    ensembles:
      - {name: vote, members: [resnet50, small50]}
      - {name: pair, members: [alexnet, vgg11], target_bytes: 9000000}    or target_ratio, or max_drop, of all members together

`defaults` and a network's own lines hold the job's options; the network's own count more. Not covered: running it (`pipeline`, `cluster`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError, SafeConstructor

from clipq_ray.config import Config, checked, make
from clipq_ray.consistency import INTENTS, NAME, NAME_WORDS
from clipq_ray.errors import ConfigError, UserError, brief
from clipq_ray.intent import Intent
from clipq_ray.source import Source

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
_OF_ENSEMBLES = ("max_drop", "target_ratio", "target_bytes")
_OF_OWN_SIZES = {"rungs": 1, "search_again": False, "hold_size": False}
"""Options that are ways to a size of one network, and their values without."""
_SAME_IMAGES = ("data", "data_root", "validation_data", "validation_images", "limit_images", "seed")
"""What members of an ensemble with one intent must have in common: their votes on validation images decide."""
_MERGE = "tag:yaml.org,2002:merge"
_TOO_DEEP = "lists or mappings nested too deep; take levels out"


@dataclass(frozen=True)
class Ensemble:
    """Networks that vote together, by the average of their probabilities; `wants`: an intent for all of them, as option and value."""

    name: str
    members: tuple[str, ...]
    wants: tuple[str, float] | None = None

    def intent_of(self, bytes_before: int) -> Intent:
        """What is wanted of members that take `bytes_before` bytes together."""
        assert self.wants is not None
        return Intent.of(make(**dict([self.wants])), bytes_before)


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
    except RecursionError as error:
        raise ConfigError(f"{option}: expected YAML in {path!r}, got {_TOO_DEEP}") from error
    except (yaml.YAMLError, ValueError) as error:  # of a date that is none
        said, mark = brief(error, None), getattr(error, "problem_mark", None)
        if isinstance(error, yaml.MarkedYAMLError) and mark is not None:
            said = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
        raise ConfigError(f"{option}: expected YAML in {path!r}, got {said}") from error


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
        self.wrong = set[str]()  # networks whose options are wrong: they are there, whatever else is said

    def say(self, line: int, text: str) -> None:
        if (line, text) not in self.mistakes:  # what the defaults say is said for every network
            self.mistakes.append((line, text))

    def part(self, node: yaml.Node | None, what: str) -> _Part:
        """A mapping, with what it merges by `<<`; anything else is a mistake and taken as empty."""
        line = node.start_mark.line + 1 if node else 1
        if not isinstance(node, yaml.MappingNode):
            self.say(line, f"expected {what} as 'name: value' lines, got {_kind(node)}")
            return _Part(line)
        result, own = _Part(line), [key for key, _ in node.value if key.tag != _MERGE]
        for number, key in enumerate(own):
            if _key(key) in map(_key, own[:number]):
                self.say(key.start_mark.line + 1, f"{_key(key)}: is there twice in {what}; leave one out")
        try:
            SafeConstructor().flatten_mapping(node)
        except (ConstructorError, RecursionError) as error:
            self.say(line, f"<<: {error.problem if isinstance(error, ConstructorError) else _TOO_DEEP}")
        for key, value in node.value:  # what is merged comes first: its own lines count more
            result.values[_key(key)], result.lines[_key(key)] = value, key.start_mark.line + 1
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
            except RecursionError:
                self.say(part.at(key), f"{key}: {_TOO_DEEP}")
                continue
            except (ConstructorError, ValueError) as error:  # ValueError: a date that is none
                problem = error.problem if isinstance(error, ConstructorError) else error
                self.say(part.at(key), f"{key}: {' '.join(str(problem).split())}")
                continue
            values[key] = tuple(value) if isinstance(value, list) else value
        return _Part(part.line, values, part.lines)

    def each(self, node: yaml.Node | None, what: str, one: str) -> Iterator[_Part]:
        """The mappings of a list; an entry that is none is one mistake, and what it may have meant by its name is there."""
        if node is None:
            return
        if not isinstance(node, yaml.SequenceNode):
            self.say(node.start_mark.line + 1, f"{what}: expected a list, got {_kind(node)}")
            return
        for entry in node.value:
            part = self.part(entry, one)
            if isinstance(entry, yaml.MappingNode):
                yield self.plain(part)
            elif isinstance(entry, yaml.ScalarNode):
                self.wrong.add(entry.value)

    def fleet(self, root: yaml.Node | None, options: Mapping[str, Any]) -> Fleet | None:
        """The whole file."""
        top = self.part(root, "a fleet")
        self.known(top, _SECTIONS, "a fleet")
        sections = top.values
        name = self.plain(
            _Part(top.line, {k: v for k, v in sections.items() if k == "name"}, top.lines)
        ).values.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            self.say(top.at("name"), f"name: expected a name of {NAME_WORDS}, got {name!r}")
        shared = sections.get("defaults")
        defaults = _Part(1) if shared is None else self.plain(self.part(shared, "defaults"))
        limited = self.limits(sections.get("limits"), defaults)
        ensembles = self.ensembles(sections.get("ensembles"))
        configs = self.models(sections.get("models"), defaults, {**limited, **options}, ensembles)
        listed = sections.get("models")
        if listed is None or (isinstance(listed, yaml.SequenceNode) and not listed.value):
            self.say(top.at("models"), "models: expected at least one network, got none")
        self.members(ensembles, {config.result_name: config for _, config in configs})
        order = sorted(configs, key=lambda one: -one[0])
        if self.mistakes:
            return None
        priorities, networks = zip(*order, strict=True)
        return Fleet(str(name), networks, tuple(one for _, one in ensembles), priorities)

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
        self,
        node: yaml.Node | None,
        defaults: _Part,
        options: Mapping[str, Any],
        ensembles: Sequence[tuple[_Part, Ensemble]],
    ) -> list[tuple[int, Config]]:
        """Priority and configuration of every network."""
        decided = {name: one for part, one in ensembles if one.wants for name in one.members}
        if self.one_intent(defaults, "defaults"):  # said once, not for every network
            left = {name: value for name, value in defaults.values.items() if name not in INTENTS}
            defaults = _Part(defaults.line, left, defaults.lines)
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
            named = str(own.get("name") or str(own.get("model")).replace(":", "."))
            ensemble = decided.get(named)
            if self.one_intent(part, "a network", ensemble):
                own = {name: value for name, value in own.items() if name not in INTENTS}
            merged = _merged(defaults.values, options, own)
            if ensemble is not None:
                merged = self.of_ensemble(ensemble, merged, part, defaults)
            config, problems = checked(merged)
            for option, text in problems:
                if option in own or option not in defaults.values:
                    self.say(part.at(option), text)
                elif option not in wrong_defaults:  # once, not for every network
                    wrong_defaults.add(option)
                    self.say(defaults.at(option), text)
            if config is None:
                self.wrong.add(named)
                continue
            self.check(config, part, lines)
            found.append((priority, config))
        return found

    def check(self, config: Config, part: _Part, lines: dict[str, int]) -> None:
        """Say whether the network and its arguments are known, and whether another has its name: `lines` by name, to which it is added."""
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

    def of_ensemble(
        self, ensemble: Ensemble, merged: Mapping[str, Any], part: _Part, defaults: _Part
    ) -> dict[str, Any]:
        """The options of a member of an ensemble with one intent: none of its own, nor what only a network with one can have."""
        left = {name: value for name, value in merged.items() if name not in INTENTS}
        for option, usual in _OF_OWN_SIZES.items():
            said = left.pop(option, usual)  # as text where the command line says it
            if getattr(checked({option: said})[0], option, said) != usual:
                place = part if option in part.values or option not in defaults.values else defaults
                self.say(
                    place.at(option),
                    f"{option}: expected none with the networks of ensemble {ensemble.name!r}, whose one intent shares out the bytes by one search of all; leave it out",
                )
        return left

    def one_intent(self, part: _Part, what: str, ensemble: Ensemble | None = None) -> bool:
        """Say where there are several intents, or one beside that of an ensemble; whether there was something to say."""
        wanted = [name for name in INTENTS if part.values.get(name) is not None]
        if ensemble is not None and wanted:
            self.say(
                part.at(wanted[0]),
                f"{wanted[0]}: expected the intent of ensemble {ensemble.name!r} to be the only one, got one of a member as well; leave one out",
            )
        elif len(wanted) > 1:
            self.say(
                part.at(wanted[1]),
                f"expected one intent in {what}, got {' and '.join(wanted)}; leave one out",
            )
        return bool(wanted) if ensemble is not None else len(wanted) > 1

    def ensembles(self, node: yaml.Node | None) -> list[tuple[_Part, Ensemble]]:
        """The section `ensembles`, each with its place."""
        seen: dict[str, int] = {}
        found = []
        for part in self.each(node, "ensembles", "an ensemble"):
            self.known(part, ("name", "members", *_OF_ENSEMBLES), "an ensemble")
            name, members = part.values.get("name"), part.values.get("members", ())
            if str(name) in seen:
                self.say(part.line, f"expected names that differ, got {name!r} as in line {seen[str(name)]}")
            seen[str(name)] = part.line
            names = tuple(map(str, members)) if isinstance(members, tuple) else ()
            if len(names) < 2 or len(set(names)) != len(names):
                self.say(
                    part.at("members"),
                    f"members: expected a list of at least two different networks, got {members!r}",
                )
                names = ()
            wants = [(one, value) for one in _OF_ENSEMBLES if (value := part.values.get(one)) is not None]
            if not self.one_intent(part, "an ensemble"):
                for option, value in wants:
                    for _, text in checked({option: value})[1]:
                        self.say(part.at(option), text)
            found.append((part, Ensemble(str(name), names, wants[0] if wants else None)))
        return found

    def members(self, ensembles: Sequence[tuple[_Part, Ensemble]], networks: Mapping[str, Config]) -> None:
        """Refuse ensembles whose members are none, or belong to two with an intent, or do not have the same images."""
        names = {one.name for _, one in ensembles}
        decided: dict[str, str] = {}
        for part, one in ensembles:
            if part.values.get("name") is None or not one.name or one.name in networks:
                self.say(
                    part.at("name"),
                    f"name: expected one that no network has, got {part.values.get('name')!r}",
                )
            for member in one.members:
                if member in networks:
                    if one.wants and member in decided:
                        self.say(
                            part.at("members"),
                            f"members: expected networks that no other intent decides, got {member!r} as in {decided[member]!r}",
                        )
                    decided.update({member: one.name} if one.wants else {})
                elif member in names:
                    self.say(
                        part.at("members"),
                        f"members: expected networks, got the ensemble {member!r}; name its members",
                    )
                elif member not in self.wrong:
                    self.say(
                        part.at("members"),
                        f"members: expected names of networks in this fleet, got {member!r}",
                    )
            known = [networks[member] for member in one.members if member in networks]
            for option in _SAME_IMAGES if one.wants else ():
                if len({getattr(config, option) for config in known}) > 1:
                    self.say(
                        part.at("members"),
                        f"members: expected the same {option} for all of an ensemble with one intent, got several; its votes are counted on the same images",
                    )


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


def _key(node: yaml.Node) -> str:
    return str(node.value).replace("-", "_")


def _kind(node: yaml.Node | None) -> str:
    if node is None:
        return "nothing"
    kinds = {"MappingNode": "a mapping", "SequenceNode": "a list"}
    return kinds.get(type(node).__name__) or repr(node.value)
