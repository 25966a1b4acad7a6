"""Reads the tools that a row offers, from all places where data sets put them, into OpenAI's format."""

from typing import Any

from accel_llm.chat.nulls import clear_arguments, clear_tool, find_removed, has_nulls
from accel_llm.chat.values import (
    BROKEN_TOOLS,
    SUCH_AS,
    Findings,
    decode_object,
    is_blank,
    read_json,
    show_name,
    show_value,
)
from accel_llm.errors import DataError

NULL_ARGUMENTS = "null values that the tool does not allow were removed from tool arguments"
NULL_DEFINITIONS = "null values were removed from tool definitions"
FLAT_PARAMETERS = (
    "the parameters of a tool are a map of arguments, not a JSON schema: they become the properties of one."
)
# A flat map of arguments, as xLAM writes it, has none of the first keys, and one of the others in each argument.
_SCHEMA_KEYS = frozenset({"properties", "patternProperties", "additionalProperties", "$ref", "$defs", "definitions"})
_SCHEMA_KEYS |= {"anyOf", "oneOf", "allOf", "not"}
_ARGUMENT_KEYS = frozenset({"type", "description"})


def collect_tools(places: list[tuple[str, Any]], findings: Findings) -> list[dict[str, Any]] | None:
    """Return the tools of several places, given by name and value: in their order, equal tools once; None if none."""
    tools: list[dict[str, Any]] = []
    for place, value in places:
        for tool in read_tools(value, place, findings) or ():
            if tool not in tools:
                tools.append(tool)
    return tools or None


def read_tools(tools: Any, where: str = "tools", findings: Findings | None = None) -> list[dict[str, Any]] | None:
    """Return a list of JSON schemas in OpenAI's format, or None if `tools` is null, blank or a list of nulls.

    The list, a tool in it, its `function` and its `parameters` may be JSON text, encoded once or more. A remark of
    `findings` says that nulls from Arrow were taken out.

    Raises:
        DataError: `tools` is something else; `where` names its place.
    """
    values = _decode(tools, where)
    if is_blank(values):
        return None
    if not isinstance(values, list):
        raise DataError(f"{where}: found {show_value(values)}; needs a list of JSON schemas", BROKEN_TOOLS)
    schemas = []
    for index, value in enumerate(values):
        schema = _decode(value, f"{where}[{index}]")
        if not isinstance(schema, dict):
            raise DataError(f"{where}[{index}]: found {show_value(schema)}; needs a JSON schema", BROKEN_TOOLS)
        if isinstance(tools, list) and isinstance(value, dict) and has_nulls(schema):
            schema = clear_tool(schema)
            if findings and schema != value:
                _note_removed(findings, NULL_DEFINITIONS, find_removed(value, schema))
        schemas.append(_wrap(schema, f"{where}[{index}]", findings))
    return schemas


def clear_calls(findings: Findings, tools: list[dict[str, Any]] | None) -> None:
    """Take the nulls of Arrow out of the arguments of the calls in `findings`, as the tools allow it."""
    for function in findings.calls:
        if has_nulls(function["arguments"]):
            arguments = clear_arguments(function["arguments"], _parameters(function["name"], tools or []))
            if arguments != function["arguments"]:
                _note_removed(findings, NULL_ARGUMENTS, find_removed(function["arguments"], arguments))
                function["arguments"] = arguments


def _note_removed(findings: Findings, sentence: str, key: str) -> None:
    """Note the first removed key of a row; the ledger joins sentences that differ in it alone."""
    if not any(remark.startswith(sentence) for remark in findings.remarks):
        findings.remark(f"{sentence}{SUCH_AS}{show_name(key)}")


def _parameters(name: str, tools: list[dict[str, Any]]) -> Any:
    """Return the parameters of the tool of that name, or None."""
    functions = [tool["function"] for tool in tools if isinstance(tool["function"], dict)]
    return next((function.get("parameters") for function in functions if function.get("name") == name), None)


def _decode(value: Any, where: str) -> Any:
    """Parse JSON text until it is no text; blank text gives None."""
    while isinstance(value, str):
        value = read_json(value, where)
    return value


def _wrap(schema: dict[str, Any], where: str, findings: Findings | None) -> dict[str, Any]:
    """Return the schema of a tool in OpenAI's format: an object with `type` and `function`."""
    if isinstance(schema.get("function"), str):
        schema = {**schema, "function": _decode(schema["function"], f"{where}.function")}
    if schema.get("function") is None:
        # OpenAI's Responses API writes the type beside the name.
        fields = {key: value for key, value in schema.items() if (key, value) != ("type", "function")}
        fields.pop("function", None)
        schema = {"type": "function", "function": fields}
    function = schema["function"]
    if is_blank(function):
        raise DataError(f"{where}: found {show_value(schema)}; needs a JSON schema", BROKEN_TOOLS)
    return {
        **schema,
        "function": _read_parameters(function, where, findings) if isinstance(function, dict) else function,
    }


def _read_parameters(function: dict[str, Any], where: str, findings: Findings | None) -> dict[str, Any]:
    """Return the function of a tool with its parameters as a JSON schema under OpenAI's key."""
    if is_blank(function.get("parameters")) and isinstance(function.get("input_schema"), dict | str):
        # Anthropic's key; the parameters keep its place.
        others = {key: value for key, value in function.items() if key != "parameters"}
        function = {"parameters" if key == "input_schema" else key: value for key, value in others.items()}
    parameters = function.get("parameters")
    if isinstance(parameters, str):
        parameters = decode_object(parameters, f"{where}.parameters")
    if isinstance(parameters, dict) and _is_flat(parameters):
        parameters = {"type": "object", "properties": parameters}
        if findings:
            findings.remark(FLAT_PARAMETERS)
    return {**function, "parameters": parameters} if "parameters" in function else function


def _is_flat(parameters: dict[str, Any]) -> bool:
    """Tell whether the parameters are no schema, but a map from each argument to its type and description."""
    arguments = parameters.values()
    return (
        bool(parameters)
        and _SCHEMA_KEYS.isdisjoint(parameters)
        and all(isinstance(argument, dict) and not _ARGUMENT_KEYS.isdisjoint(argument) for argument in arguments)
    )
