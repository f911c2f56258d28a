"""Strict YAML: duplicate keys refused, YAML 1.2 numbers, pydantic schemas that forbid the unknown."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

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
    """Safe loader that refuses duplicate keys and reads ``1e-3`` and ``010`` as the numbers YAML 1.2 says they are."""

    def construct_document(self, node: yaml.Node) -> Any:
        return self.construct_object(node, deep=True)  # deep: an alias within its own anchor is an error, not a loop

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) are not supported", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key '{key}' (line {line})")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes text which ``_Loader`` would read as a number, such as a commit called ``12e4567``."""


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_NUMBERS = {
    _INT: re.compile(r"^[-+]?[0-9]+$|^0o[0-7]+$|^0x[0-9a-fA-F]+$"),
    _FLOAT: re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor(_INT, _Loader.construct_yaml_int)
for _tag, _regex in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, _regex, list("-+0123456789."))
    _Dumper.add_implicit_resolver(_tag, _regex, list("-+0123456789."))


def parse_yaml(text: str, file: str | Path | None = None) -> Any:
    """Parse one YAML document strictly.

    Errors:
        SpecError: on syntax errors and duplicate keys, with the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = "" if mark is None else f" (line {mark.line + 1})"
        raise SpecError(f"{error.problem}{line}", file=file) from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise SpecError(f"not valid YAML: {error}", file=file) from None


def dump_yaml(data: Any, flow: bool = False) -> str:
    """Return plain data as YAML that ``parse_yaml`` reads back the same; ``flow``: innermost lists and mappings in one line."""
    style = None if flow else False
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=style, width=120 if flow else 80)


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
        faults = error.errors(include_url=False)
        first = _location(data, faults[0])
        # Of the branches of a union the one that got furthest into the data says best what is wrong.
        fault = max((f for f in faults if _location(data, f)[: len(first)] == first), key=lambda f: len(_location(data, f)))
        raise SpecError(_say(schema, fault), file=file, key=_dotted(prefix, _location(data, fault))) from None


def _location(data: Any, fault: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the fault's path in the data, without the names of union branches pydantic puts into it."""
    kept: list[Any] = []
    parts = fault["loc"]
    for part in parts:
        absent = part == parts[-1] and fault["type"] == "missing"
        if isinstance(data, Mapping) and part in data:
            data = data[part]
        elif isinstance(part, int) and isinstance(data, Sequence) and part < len(data):
            data = data[part]
        elif not absent:
            continue
        kept.append(part)
    return tuple(kept)


def _dotted(prefix: str, location: tuple[Any, ...]) -> str:
    key = prefix
    for part in location:
        key += f"[{part}]" if isinstance(part, int) else f"{'.' if key else ''}{part}"
    return key


def _say(schema: type[BaseModel], fault: Mapping[str, Any]) -> str:
    found = fault.get("input")
    if fault["type"] == "extra_forbidden":
        owner = _owner(schema, fault["loc"][:-1])
        return f"unknown key{suggest(str(fault['loc'][-1]), owner.model_fields) if owner else ''}"
    if fault["type"] == "missing":
        return "missing; this key is required"
    if isinstance(found, float) and not math.isfinite(found):
        return f"expected a finite number, found {found}"
    message = fault["msg"].removeprefix("Value error, ")
    short = repr(found) if isinstance(found, (str, int, float)) else reprlib.repr(found)  # nested aliases can be endless
    return message if isinstance(found, Mapping) or short in message or len(short) > 60 else f"{message}, found {short}"


def _owner(schema: type[BaseModel], path: tuple[Any, ...]) -> type[BaseModel] | None:
    """Return the model class at ``path`` below ``schema``, through sequences, mappings and unions told apart by ``kind``."""
    kinds, key = [schema], False
    for part in path:
        if isinstance(part, int) or key:
            key = False
            continue
        if len(kinds) == 1 and part in kinds[0].model_fields:
            annotation = kinds[0].model_fields[part].annotation
            kinds, key = _models(annotation), get_origin(annotation) is Mapping
        else:
            tagged = [kind for kind in kinds if "kind" in kind.model_fields]
            kinds = [kind for kind in tagged if part in get_args(kind.model_fields["kind"].annotation)]
    return kinds[0] if len(kinds) == 1 else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) is None:
        return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
    return [model for part in get_args(annotation) for model in _models(part)]


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
