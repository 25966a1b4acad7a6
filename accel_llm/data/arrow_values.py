"""Rows of Arrow tables as values of Python."""

import json
from typing import Any

import pyarrow as pa


def plain_values(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    """Convert Arrow rows to Python values.

    Arrow stores columns of mixed types as JSON text, which `to_pylist` returns as text; here it is parsed.
    """
    rows = batch.to_pylist()
    for field in batch.schema:
        if "arrow.json" in str(field.type):
            for row in rows:
                row[field.name] = _parse_json(row[field.name], field.type)
    return rows


def _parse_json(value: Any, kind: pa.DataType) -> Any:
    """Parse the JSON text in a value of Arrow type `kind`, at any depth."""
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {field.name: _parse_json(value[field.name], field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_parse_json(item, kind.value_type) for item in value]
    return value
