"""Strict YAML: duplicate keys refused, YAML 1.2 floats, pydantic schemas that forbid the unknown."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from mbctrl.base.errors import SpecError, suggest

S = TypeVar("S", bound=BaseModel)


def _finite(value: Any) -> Any:
    # A quoted or exotic spelling reaches here as text: say so instead of converting it silently.
    if isinstance(value, bool) or isinstance(value, str):
        raise ValueError(f"expected a number, found {value!r}")
    return value


Number = Annotated[float, BeforeValidator(_finite)]
"""A finite float; text and booleans are refused rather than converted."""


class Spec(BaseModel):
    """Base of every schema: frozen, no unknown keys, no infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses duplicate keys and reads ``1e-3`` as the number YAML 1.2 says it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key '{key}' (line {line})")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, file: str | Path | None = None) -> Any:
    """Parse one YAML document strictly.

    Errors:
        SpecError: on syntax errors and duplicate keys, with the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 -- _Loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = "" if mark is None else f" (line {mark.line + 1})"
        raise SpecError(f"{error.problem}{line}", file=file) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"not valid YAML: {error}", file=file) from None


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot be read: {getattr(error, 'strerror', None) or error}", file=path) from None
    data = parse_yaml(text, path)
    if not isinstance(data, dict):
        raise SpecError(f"expected a mapping of keys to values, found {type(data).__name__}", file=path)
    return data


def validate(schema: type[S], data: Any, file: str | Path | None = None, prefix: str = "") -> S:
    """Validate ``data`` against ``schema``; the first fault becomes a one-line SpecError naming file and key."""
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise SpecError(_say(schema, fault), file=file, key=_dotted(prefix, fault["loc"])) from None


def _dotted(prefix: str, location: tuple[Any, ...]) -> str:
    key = prefix
    for part in location:
        key += f"[{part}]" if isinstance(part, int) else f"{'.' if key else ''}{part}"
    return key


def _say(schema: type[BaseModel], fault: Mapping[str, Any]) -> str:
    found = fault.get("input")
    if fault["type"] == "extra_forbidden":
        owner = _owner(schema, fault["loc"][:-1])
        known = owner.model_fields if owner else {}
        return f"unknown key{suggest(str(fault['loc'][-1]), known)}"
    if fault["type"] == "missing":
        return "missing; this key is required"
    if isinstance(found, float) and not math.isfinite(found):
        return f"expected a finite number, found {found}"
    message = fault["msg"].removeprefix("Value error, ")
    short = repr(found)
    return message if short in message or len(short) > 60 else f"{message}, found {short}"


def _owner(schema: type[BaseModel], path: tuple[Any, ...]) -> type[BaseModel] | None:
    """Return the model class at ``path`` below ``schema``, as far as plain nesting goes."""
    for part in path:
        field = schema.model_fields.get(part) if isinstance(part, str) else None
        kinds = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not nested:
            return None
        schema = nested[0]
    return schema


def import_name(name: str, known: Mapping[str, str], *, file: str | Path | None = None, key: str | None = None) -> Any:
    """Return the object a built-in short name or a ``"package.module:Name"`` stands for."""
    target = known.get(name, name)
    module, _, attribute = target.partition(":")
    if not attribute:
        raise SpecError(f"unknown name '{name}'{suggest(name, known)} (or 'package.module:Name')", file=file, key=key)
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"cannot import '{target}': {error}", file=file, key=key) from None
