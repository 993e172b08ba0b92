"""JSON schemas for answers: reading them, narrowing them for a small model, bounding how long an answer takes to end.

Which keywords can be followed at all is the grammar library's matter (see `constraint`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from mlx_fastvlm.errors import OptionError

MAX_BYTES = 2**16  # a schema's text; one of this size takes the grammar library about a second
MAX_DEPTH = 64
MAX_EXACT = 2**53 - 1
MAX_MULTIPLE = 1000  # the automaton for "multiple of n" has n states: a large n takes seconds and much memory

_ANNOTATIONS = frozenset(
    "$schema $id $comment $defs definitions title description default examples deprecated readOnly writeOnly".split()
)
_NUMBER_BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
# What `narrow` understands; another keyword may look at a part from outside, so it leaves everything as it is.
_PLAIN = _NUMBER_BOUNDS | frozenset(
    "type properties required additionalProperties items prefixItems minItems maxItems anyOf $ref enum const "
    "minLength maxLength pattern format multipleOf".split()
)


def read_json_schema(path: str | Path) -> dict[str, Any]:
    """The JSON schema in a file. Raises OptionError if it cannot be read or is no JSON object."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise OptionError(f"The JSON schema {path} cannot be read ({error.strerror}).") from None
    try:
        return parse_schema(text.decode("utf-8"))
    except UnicodeDecodeError:
        raise OptionError(f"The JSON schema {path} is not UTF-8 text.") from None
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from None


def parse_schema(schema: Mapping[str, Any] | str | bool) -> dict[str, Any]:
    """A schema as an object of its own, whatever form it came in; True stands for any JSON object.

    Raises:
        OptionError: it is not JSON, not an object, too large, too deep, or asks for what cannot be promised.
    """
    if schema is True:
        return {"type": "object"}
    try:
        text = schema if isinstance(schema, str) else json.dumps(dict(schema), allow_nan=False)
        if len(text.encode()) > MAX_BYTES:
            raise OptionError(f"The JSON schema has more than {MAX_BYTES // 1024} KB; make it smaller.")
        parsed = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, TypeError, RecursionError) as error:
        raise OptionError(
            f"The JSON schema is not JSON ({error}); expected an object such as a schema file's."
        ) from None
    if parsed is True:
        return {"type": "object"}
    if not isinstance(parsed, dict):
        raise OptionError(f"The JSON schema is {_shortened(text)}; expected an object such as {{'type': 'object', …}}.")
    _check_depth(parsed)
    for node in _subschemas(parsed):
        _check_promises(node)
    parsed.pop("x-guidance", None)  # the grammar library's own settings are not the schema's to make
    return parsed


def narrow(schema: dict[str, Any]) -> None:
    """Take freedoms away that a small model does not handle, in place.

    There are fewer answers then, all of which meet the schema as it was. JSON Schema allows any property that is not
    forbidden, and numbers of any length; a model left to it invents properties, or repeats a digit, until its tokens
    run out. So an object that lists its properties has no others, and numbers lie within ±(2⁵³ - 1), which every reader
    of JSON keeps exact (RFC 8259, section 6), unless the schema says so itself. Where keywords look at a part from
    outside (allOf, oneOf, anything next to anyOf or $ref), all stays as it is. The schema is one that the grammar
    library takes.
    """
    nodes = list(_subschemas(schema))
    if all(_is_plain(node) for node in nodes):
        for node in nodes:
            _close_object(node)
            _bound_number(node)


def _close_object(node: dict[str, Any]) -> None:
    named, required = node.get("properties"), node.get("required", [])
    # Of other types are only those of definitions that nothing refers to: the grammar library does not look at them.
    if (
        isinstance(named, dict)
        and isinstance(required, list)
        and named
        and all(str(name) in named for name in required)
    ):
        node.setdefault("additionalProperties", False)


def _bound_number(node: dict[str, Any]) -> None:
    types = node.get("type")
    names = types if isinstance(types, list) else [types]
    if ("integer" not in names and "number" not in names) or "enum" in node or "const" in node:
        return
    least, most = _values(node, "minimum", "exclusiveMinimum"), _values(node, "maximum", "exclusiveMaximum")
    if not least and all(bound > -MAX_EXACT for bound in most):
        node["minimum"] = -MAX_EXACT
    if not most and all(bound < MAX_EXACT for bound in least):
        node["maximum"] = MAX_EXACT


def _values(node: dict[str, Any], *keys: str) -> list[float]:
    return [node[key] for key in keys if isinstance(node.get(key), int | float)]


def ending_bound(schema: dict[str, Any]) -> float:
    """Bytes that suffice to end an answer from any point of it: infinity where the schema sets no simple bound.

    Compact JSON is assumed, and a schema that the grammar library takes: its keywords hold what they should. Infinite
    are recursive schemas, objects and arrays open to anything, patterns, formats and whatever else is not counted here.
    """
    try:
        return _Bounds(schema).of(schema)
    except _UnboundedError:
        return float("inf")


def keyword_values(schema: dict[str, Any], keyword: str) -> set[str]:
    """The texts that a keyword such as "pattern" has in a schema."""
    values = (node.get(keyword) for node in _subschemas(schema))
    return {value for value in values if isinstance(value, str)}


class _UnboundedError(Exception):
    """There is a part whose endings have no simple bound."""


class _Bounds:
    """Ending bounds of the parts of one schema."""

    def __init__(self, root: dict[str, Any]):
        self._root = root
        self._of_references: dict[str, int | None] = {}  # None while it is being counted: a reference to itself

    def of(self, node: Any) -> int:
        """Raises _UnboundedError."""
        keys = _keywords(node)
        if keys == {"$ref"}:
            return self._of_reference(node["$ref"])
        if keys == {"anyOf"}:
            return max((self.of(branch) for branch in node["anyOf"]), default=0)
        if keys == {"const"}:
            return _text_length(node["const"])
        if "enum" in keys and keys <= {"enum", "type"}:
            return max(map(_text_length, node["enum"]), default=0)
        types = node.get("type") if isinstance(node, dict) else None
        names = types if isinstance(types, list) else [types]
        return max(self._of_type(name, node, keys - {"type"}) for name in names) if names else 0

    def _of_reference(self, reference: str) -> int:
        if reference not in self._of_references:
            self._of_references[reference] = None
            self._of_references[reference] = self.of(_resolve(self._root, reference))
        bound = self._of_references[reference]
        if bound is None:
            raise _UnboundedError
        return bound

    def _of_type(self, name: str | None, node: dict[str, Any], keys: frozenset[str]) -> int:
        if name in ("null", "boolean") and not keys:
            return len("false")
        if name in ("integer", "number") and keys <= _NUMBER_BOUNDS:
            return 8 + max((_digits(node[key]) for key in keys), default=0)
        if name == "string" and keys <= {"minLength", "maxLength"}:
            return node.get("minLength", 0) + 12  # the rest of an escape or a character, the quote
        if name == "array" and "items" in keys <= {"items", "minItems", "maxItems"}:
            return 2 + (1 + node.get("minItems", 0)) * (1 + self.of(node["items"]))
        if name == "object" and "additionalProperties" in keys <= {"properties", "required", "additionalProperties"}:
            return self._of_object(node)
        raise _UnboundedError

    def _of_object(self, node: dict[str, Any]) -> int:
        properties, others = node.get("properties", {}), node["additionalProperties"]
        if not set(node.get("required", ())) <= set(properties):
            raise _UnboundedError
        named = sum(_text_length(key) + len(":,") + self.of(value) for key, value in properties.items())
        return len("{}") + named + (0 if others is False else 16 + self.of(others))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_depth(schema: dict[str, Any]) -> None:
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return
    raise OptionError(f"The JSON schema is nested more than {MAX_DEPTH} levels deep; make it flatter, or use $ref.")


def _children(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        yield from node.values()
    elif isinstance(node, list):
        yield from node


def _check_promises(node: dict[str, Any]) -> None:
    """Refuse what the grammar would take and not keep, or keep at too high a price."""
    fewest, required = node.get("minProperties"), node.get("required")
    if isinstance(fewest, int) and fewest > max(1, len(required) if isinstance(required, list) else 0):
        # Names outside "properties" may come twice in an answer, and then count once.
        raise OptionError(
            f"minProperties is {fewest} in the JSON schema; list that many properties as required instead."
        )
    multiple = node.get("multipleOf")
    if isinstance(multiple, int | float) and (multiple > MAX_MULTIPLE or 0 < multiple < 1 / MAX_MULTIPLE):
        raise OptionError(f"multipleOf is {multiple} in the JSON schema; at most {MAX_MULTIPLE} can be followed.")


def _subschemas(node: Any) -> Iterator[dict[str, Any]]:
    """The schema and those in it, down to every level."""
    if not isinstance(node, dict):
        return
    yield node
    for key, value in node.items():
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, dict):
            parts = list(value.values())
        elif key in ("items", "additionalProperties"):
            parts = [value]
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            parts = value
        else:
            continue
        for part in parts:
            yield from _subschemas(part)


def _is_plain(node: dict[str, Any]) -> bool:
    keys = _keywords(node)
    return keys <= _PLAIN and (len(keys) == 1 or not keys & {"anyOf", "$ref"})


def _keywords(node: Any) -> frozenset[str]:
    return frozenset(node) - _ANNOTATIONS if isinstance(node, dict) else frozenset()


def _resolve(root: dict[str, Any], reference: str) -> Any:
    """The part that a reference such as `#/$defs/x` names. Raises _UnboundedError if there is none."""
    node: Any = root
    head, *path = reference.split("/")
    for name in path:
        node = node.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(node, dict) else None
    if head != "#" or node is None:
        raise _UnboundedError
    return node


def _text_length(value: Any) -> int:
    """Bytes of a value as compact JSON, escapes written out: at least what an answer spends on it."""
    return len(json.dumps(value, separators=(",", ":")))


def _digits(number: float | bool) -> int:
    """Characters of a number written out. Raises _UnboundedError for the true and false that draft 4 has as bounds."""
    if isinstance(number, bool):
        raise _UnboundedError
    return len(format(Decimal(str(number)), "f"))


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"
