"""Takes out the nulls that Arrow fills into tool arguments and tool definitions.

A column of objects has the keys of all its rows in Arrow, and null for each key that a row does not have. Such a null
is taken out, unless the tool's own parameters allow null in its place. Lists keep their nulls, and so does JSON text:
Arrow does not look inside it.
"""

from collections.abc import Iterable, Iterator
from typing import Any

_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")  # keywords that map names to schemas
_VALUES = ("default", "const", "example")  # keywords with a value in place of a schema
_VALUE_LISTS = ("enum", "examples", "required")
_MAX_STEPS = 100  # references to follow; a schema may refer to itself


def has_nulls(value: Any) -> bool:
    """Tell whether an object, or one inside it, has a key with null."""
    if isinstance(value, dict):
        return None in value.values() or any(map(has_nulls, value.values()))
    return isinstance(value, list) and any(map(has_nulls, value))


def clear_arguments(arguments: dict[str, Any], parameters: Any) -> dict[str, Any]:
    """Return a call's arguments without the nulls that `parameters`, the tool's JSON schema, do not allow."""
    return _clear_value(arguments, [parameters], parameters)


def clear_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool's definition without nulls; `default: null` stays where null is allowed, an `enum` as it is."""
    return _clear_schema(tool, tool)


def find_removed(before: Any, after: Any) -> str:
    """Return the first key that `before` has and `after`, the same value without some of its nulls, has not; or ""."""
    if isinstance(before, dict):
        for key, item in before.items():
            if key not in after:
                return str(key)
            if removed := find_removed(item, after[key]):
                return removed
    if isinstance(before, list):
        return next(filter(None, map(find_removed, before, after)), "")
    return ""


def _clear_value(value: Any, schemas: list[Any], root: Any) -> Any:
    """Return `value` without the nulls in its objects that no schema of `schemas` allows."""
    if isinstance(value, list):
        items = [schema.get("items") for schema in _alternatives(schemas, root)]
        return [_clear_value(item, items, root) for item in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, item in value.items():
        inner = [_property(schema, key) for schema in _alternatives(schemas, root)]
        if item is not None or _allows_null(inner, root):
            result[key] = _clear_value(item, inner, root)
    return result


def _clear_schema(schema: dict[str, Any], root: Any) -> dict[str, Any]:
    """Return a schema, or an object that holds one, without its nulls; `root` resolves references."""
    root = schema.get("parameters") or root  # references begin at the parameters
    result: dict[str, Any] = {}
    for key, item in schema.items():
        if item is None:
            if key in ("default", "const") and _allows_null([schema], root):
                result[key] = None
        elif key in _VALUE_LISTS:
            result[key] = item
        elif key in _VALUES:
            result[key] = _clear_value(item, [schema], root)
        elif key in _NAMED_SCHEMAS and isinstance(item, dict):
            named = {name: inner for name, inner in item.items() if inner is not None}
            result[key] = {name: _clear_any(inner, root) for name, inner in named.items()}
        else:
            result[key] = _clear_any(item, root)
    return result


def _clear_any(value: Any, root: Any) -> Any:
    if isinstance(value, list):
        return [_clear_any(item, root) for item in value]
    return _clear_schema(value, root) if isinstance(value, dict) else value


def _property(schema: dict[str, Any], key: str) -> Any:
    """Return the schema of one key of an object. Some data sets write the properties without `properties`."""
    properties = schema.get("properties")
    inner = properties.get(key) if isinstance(properties, dict) else schema.get(key)
    return schema.get("additionalProperties") if inner is None else inner


def _allows_null(schemas: Iterable[Any], root: Any) -> bool:
    for schema in _alternatives(schemas, root):
        kind = schema.get("type")
        if kind == "null" or (isinstance(kind, list) and "null" in kind) or schema.get("nullable") is True:
            return True
        values = schema.get("enum")
        if isinstance(values, list) and None in values:
            return True
    return False


def _alternatives(schemas: Iterable[Any], root: Any) -> Iterator[dict[str, Any]]:
    """Yield the schemas and those that they refer to or consist of."""
    waiting = list(schemas)
    for _ in range(_MAX_STEPS):
        if not waiting:
            return
        schema = waiting.pop()
        if not isinstance(schema, dict):
            continue
        yield schema
        for keyword in ("anyOf", "oneOf", "allOf"):
            inner = schema.get(keyword)
            waiting += inner if isinstance(inner, list) else []
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith("#/"):
            waiting.append(_look_up(reference, root))


def _look_up(reference: str, root: Any) -> Any:
    """Return what a reference such as `#/$defs/Place` stands for, or None."""
    value = root
    for name in reference[2:].split("/"):
        value = value.get(name) if isinstance(value, dict) else None
    return value
