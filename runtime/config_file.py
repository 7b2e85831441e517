"""Read one YAML file into a `Config`, and report all problems at once.

python -m runtime.config_file docs/settings.md     # updates the table of all settings in the file
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from typing_extensions import override

from base.reading import MAX_MESSAGE, read_text, reading
from base.text import escape, shorten
from config import Config
from runtime.markdown import markdown_table

MAX_CONFIG_BYTES, MAX_NODES, MAX_DEPTH = 1 << 20, 1000, 10  # a file of settings has about 100 values in 4 levels
REMEDY = "docs/settings.md lists all settings"
ABSENT = "(absent)"  # in place of the value of a setting that another objective or data set does not have
TAGS = ("objective.name=", "data.dataset=")  # settings that select the class of their section


class _Loader(yaml.SafeLoader):
    """PyYAML with changes: `3e-4` is a number (YAML 1.1 requires `3.0e-4`), and duplicate keys are errors.

    So are aliases, which let a few hundred bytes grow to gigabytes, and more nodes or levels than settings have.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.n_nodes = self.depth = 0

    @override
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; see PyYAML."""
        self.n_nodes += 1
        if self.check_event(yaml.AliasEvent):
            raise self._error("aliases (*name) are not supported")
        if self.n_nodes > MAX_NODES or self.depth == MAX_DEPTH:
            raise self._error(f"more than {MAX_NODES} values or {MAX_DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    @override
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node; see PyYAML."""
        keys = Counter(key.value if isinstance(key, yaml.ScalarNode) else "" for key, _ in node.value)
        for key, count in keys.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", node.start_mark)
        return super().construct_mapping(node, deep)

    def _error(self, problem: str) -> yaml.YAMLError:
        return yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply `section.key=value` overrides and check all settings.

    Raises:
        ValueError: the file is missing or not a YAML mapping, or a setting is wrong; the message lists all problems.
    """
    return override_config(read_sections(path), overrides, str(path))


def override_config(raw: dict[str, Any], overrides: Sequence[str], source: str) -> Config:
    """`read_config` for a mapping read from `source` (for error messages), which is changed."""
    # Overrides of the objective or data set first, so that overrides of its settings may be in any order.
    for text in sorted(overrides, key=lambda text: not text.startswith(TAGS)):
        with reading(f"override {text!r}", REMEDY):
            _apply_override(raw, text)
    return parse_config(raw, source)


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words of a command line as names (of runs) and overrides (`section.key=value`); a path that exists is a name."""
    names = [word for word in words if "=" not in word or Path(word).exists()]
    return names, [word for word in words if word not in names]


def read_sections(path: str | Path) -> dict[str, Any]:
    """The content of a YAML file of settings, unchecked.

    Raises:
        ValueError: the file is missing or not a YAML mapping.
    """
    with reading(f"config {path}", REMEDY):
        raw = yaml.load(read_text(Path(path), MAX_CONFIG_BYTES), Loader=_Loader)
        if not isinstance(raw, dict):
            raise ValueError(f"it must be a mapping with sections {', '.join(Config.model_fields)}, got {raw!r}")
        return raw


def parse_config(raw: dict[str, Any], source: str) -> Config:
    """Check a mapping read from `source` (for error messages); the ValueError lists all problems."""
    with reading(f"config {source}", REMEDY):
        # As JSON: pydantic's strict mode then accepts lists for tuples, but still no strings for numbers.
        text = json.dumps(raw, default=str)
    try:
        return Config.model_validate_json(text, context=raw)
    except ValidationError as error:
        problems = [shorten(escape(_explain(details)), MAX_MESSAGE - 2) for details in _all_errors(error)]
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise ValueError(f"config {source}: {count}\n" + "\n".join(f"  {problem}" for problem in problems)) from None


def dump_config(config: Config) -> str:
    """All settings, including defaults, as YAML text."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(config: Config) -> dict[str, Any]:
    """Settings by dotted name, e.g. `{"model.vocab_size": 11, ...}`."""
    return {
        f"{section}.{key}": value
        for section, settings in config.model_dump(mode="json").items()
        for key, value in settings.items()
    }


def setting_name(config: Config) -> str:
    """A name that runs share if their settings differ only in the seed or in what does not change the result.

    A resumed run may find its data in another folder, since their hashes are compared. Here nothing but the folder
    tells which data they are, so the description of the data, which names the folder where it is the source, counts.
    """
    free = {*_free_settings(config), "training.seed"}
    facts = {key: value for key, value in flatten(config).items() if key not in free}
    facts["data"] = config.data.describe()
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{config.data.dataset}_{config.objective.name}_{digest[:6]}"


def changed_settings(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Differences that would change the result of a resumed run: old and new value (or `ABSENT`) by dotted name."""
    before, after, free = flatten(old), flatten(new), _free_settings(old) | _free_settings(new)
    values = {key: (before.get(key, ABSENT), after.get(key, ABSENT)) for key in sorted(before | after)}
    return {key: (was, now) for key, (was, now) in values.items() if was != now and key not in free}


def format_changes(changes: dict[str, tuple[Any, Any]]) -> str:
    """What `changed_settings` has found, as indented lines."""
    return "\n".join(
        f"  {key}: {shorten(str(was), 100)} -> {shorten(str(now), 100)}" for key, (was, now) in changes.items()
    )


def _free_settings(config: Config) -> set[str]:
    """Dotted names of the settings that a resumed run may change."""
    return {
        f"{name}.{key}"
        for name, section in config
        for key, field in type(section).model_fields.items()
        if section.free_on_resume or "free_on_resume" in (field.json_schema_extra or {})
    }


def _apply_override(raw: dict[str, Any], given: str) -> None:
    key, equals, text = given.partition("=")
    if not equals or not key:
        raise ValueError("it is not of the form section.key=value")
    value = yaml.load(text, Loader=_Loader)
    if not isinstance(value, str | None) and _holds_text(key):
        value = text  # [SEP] is a list in YAML
    if given.startswith(TAGS):
        _drop_unknown(raw, key, value)
    *sections, last = key.split(".")
    target = raw
    for section in sections:
        if not isinstance(target.setdefault(section, {}), dict):
            raise ValueError(f"{section!r} is not a section")
        target = target[section]
    target[last] = value


def _holds_text(key: str) -> bool:
    """Whether a setting is text or null in every class that has it."""
    section, _, name = key.partition(".")
    kinds = [model.model_fields[name].annotation for model in _models_of(section) if name in model.model_fields]
    return bool(kinds) and all(kind in (str, str | None) for kind in kinds)


def _drop_unknown(raw: dict[str, Any], key: str, value: Any) -> None:
    """Before an override selects another objective or data set, drop the settings that the new one does not have.

    A new data set keeps none, since equal names have other meanings there.
    """
    section, _, tag = key.partition(".")
    given = raw.get(section)
    if not isinstance(given, dict) or given.get(tag) == value:
        return
    fields = next((model.model_fields for model in _models_of(section) if value in _literal(model, tag)), {})
    raw[section] = {name: each for name, each in given.items() if name in fields and section == "objective"}


def _all_errors(error: ValidationError) -> list[ErrorDetails]:
    """All errors, without the extra `too_short` that pydantic reports for a list whose entries are all invalid."""
    errors = error.errors(include_url=False)
    parents = {details["loc"][:-1] for details in errors}
    return [details for details in errors if not (details["type"] == "too_short" and details["loc"] in parents)]


def _explain(details: ErrorDetails) -> str:
    """One line for a problem: the key, the value and what is allowed."""
    location = list(details["loc"])
    if len(location) > 1 and len(_models_of(str(location[0]))) > 1:
        del location[1]  # the objective or data set, which pydantic adds
    key = ".".join(str(part) for part in location)
    value, kind = details["input"], details["type"]
    shown = shorten(repr(value), 100)
    if kind == "extra_forbidden":
        known = list(_known_keys([str(part) for part in details["loc"][:-1]]))
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{key} = {shown}: unknown key; {hint}"
    if kind == "missing":
        return f"{key}: missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag, named = details["ctx"]["discriminator"].strip("'"), details["ctx"].get("tag")
        if named is None:
            return f"{key}.{tag}: missing"
        names = details["ctx"]["expected_tags"]
        near = difflib.get_close_matches(named, re.findall("'(.*?)'", names), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{key}.{tag} = {named!r}: {hint}it is one of {names}"
    message = details["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if isinstance(value, dict):  # a check of several keys; the message names them
        return message if message.startswith(tuple(Config.model_fields)) else f"{key}: {message}"
    return f"{key} = {shown}: {message}"


def _literal(model: type[BaseModel], field: str) -> tuple[str, ...]:
    annotation = model.model_fields[field].annotation if field in model.model_fields else None
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    """What `name` or `dataset` may be in settings of this class; none if it has neither."""
    return (*_literal(model, "name"), *_literal(model, "dataset"))


def _models_of(section: str) -> list[type[BaseModel]]:
    """The classes of a section; none if there is no such section."""
    return [model for name, models in _sections() if name == section for model in models]


def _sections() -> Iterator[tuple[str, list[type[BaseModel]]]]:
    """Section names, each with its possible settings classes."""
    for name, field in Config.model_fields.items():
        members = get_args(field.annotation) or (field.annotation,)
        yield name, [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]


def _known_keys(location: list[str]) -> Iterator[str]:
    """Keys allowed at the location of an unknown key: sections at the top level, else keys of the section's class."""
    if not location:
        yield from Config.model_fields
        return
    for model in _models_of(location[0]):
        if len(location) == 1 or location[1] in _tags(model):
            yield from model.model_fields


def settings_table() -> str:
    """Markdown table of all settings, for docs/settings.md."""
    rows = []
    for section, models in _sections():
        for model in models:
            tags = _tags(model)
            label = f"{section} ({tags[0]})" if tags else section
            for key, field in model.model_fields.items():
                if field.description is None:  # the tag itself
                    continue
                default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
                rows.append([f"`{label}` `{key}`", default, field.description])
    return "\n".join(markdown_table(["setting", "default", "meaning"], rows, text_columns=range(3)))


def insert_settings(text: str) -> str:
    """Insert the table of settings between the two marks of a document; raises ValueError if it has no marks."""
    begin, end = (re.search(mark, text) for mark in (r"<!-- settings: .*-->\n", r"<!-- /settings -->"))
    if begin is None or end is None:
        raise ValueError("the document has no marks <!-- settings: ... --> and <!-- /settings -->")
    return f"{text[: begin.end()]}{settings_table()}\n{text[end.start() :]}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(insert_settings(Path(name).read_text(encoding="utf-8")), encoding="utf-8")
