"""Recipes: one YAML file plus ``key=value`` overrides, read into a configuration; every error at once."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from .bundled import bundled_configs
from .config import Section
from .errors import UserError

C = TypeVar("C", bound=Section)


def parse(kind: type[C], source: str, overrides: list[str]) -> C:
    """Read ``source`` (a file, or the name of a bundled recipe) and apply dotted ``key=value`` overrides.

    Raises:
        UserError: with every offending key, what it got and what was expected.
    """
    path = Path(source)
    if not path.is_file():
        path = bundled_configs().get(source.removesuffix(".yaml"), path)
    if not path.is_file():
        raise UserError(f"no config file {source!r}; bundled recipes are {', '.join(bundled_configs())}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path.name} must hold key: value pairs, got {type(values).__name__}")
    for override in overrides:
        _override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = _explain(kind, error)
        count = f"{len(lines)} invalid value{'s' if len(lines) > 1 else ''}"
        raise UserError("\n  ".join([f"{path.name}: {count}", *lines])) from None


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} must have the form key=value, for example training.batch_size=32")
    node, (*parents, leaf) = values, key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section")
        node = child
    node[leaf] = _scalar(text)


def _scalar(text: str) -> Any:  # noqa: ANN401
    """A YAML value; ``1e-5``, which YAML 1.1 reads as text, is a number here."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override value {text!r} is not valid YAML: {error}") from None
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def _explain(kind: type[Section], error: ValidationError) -> list[str]:
    """One line per invalid value, with the nearest known key where one is unknown."""
    known = sorted(_keys(kind))
    lines = []
    for item in _likely(error.errors()):
        location = ".".join(str(part) for part in item["loc"])
        leaf = str(item["loc"][-1]) if item["loc"] else ""
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            near = difflib.get_close_matches(leaf, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"{location}: unexpected key, got {item['input']!r}{hint}")
        elif item["type"] in ("missing", "missing_argument"):
            lines.append(f"{location}: missing")
        else:
            message = item["msg"].removeprefix("Value error, ").replace("Input should be ", "must be ")
            got = (
                "" if item["type"] == "value_error" and isinstance(item["input"], dict) else f", got {item['input']!r}"
            )
            lines.append(f"{location}: {message}{got}")  # what is wrong with a section as a whole says what
    return lines


def _likely(errors: Sequence[Any]) -> list[Any]:
    """Where a value may be one of several kinds, pydantic reports the failure of each: keep the nearest kind's."""
    kinds: dict[tuple[Any, ...], dict[Any, list[Any]]] = {}
    for item in errors:
        at = next((k for k, part in enumerate(item["loc"]) if str(part)[:1].isupper()), None)
        place, chosen = (item["loc"], None) if at is None else (item["loc"][:at], item["loc"][at])
        kinds.setdefault(place, {}).setdefault(chosen, []).append(item)
    return [item for choices in kinds.values() for item in min(choices.values(), key=len)]


def _keys(kind: type[Section]) -> set[str]:
    """Every key name that the configuration knows, at any depth."""
    schema = kind.model_json_schema()
    return {name for part in (schema, *schema.get("$defs", {}).values()) for name in part.get("properties", {})}
