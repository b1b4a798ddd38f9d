"""A checker of what `--json` prints against docs/schemas, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMAS = Path(__file__).resolve().parents[1] / "docs" / "schemas"
TYPES: dict[str, Any] = {
    "number": (int, float),
    "string": str,
    "integer": int,
    "boolean": bool,
    "null": type(None),
}


def faults(schema: dict[str, Any], value: Any, where: str = "$") -> list[str]:
    """The keywords that our schemas use. https://json-schema.org/draft/2020-12"""
    if "$ref" in schema:
        return faults(load(schema["$ref"].removesuffix(".json")), value, where)
    if "anyOf" in schema:
        tried = [faults(one, value, where) for one in schema["anyOf"]]
        return [] if [] in tried else min(tried, key=len)
    if "const" in schema or "enum" in schema:
        allowed = schema.get("enum", [schema.get("const")])
        return [] if value in allowed else [f"{where} is {value!r}"]
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    if kinds == ["array"]:
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [f for i, one in enumerate(value) for f in faults(schema["items"], one, f"{where}[{i}]")]
    if kinds == ["object"]:
        return _object_faults(schema, value, where)
    right = any(
        isinstance(value, TYPES[k]) and (k == "boolean" or not isinstance(value, bool)) for k in kinds
    )
    return [] if right else [f"{where} is {value!r}, no {kinds}"]


def _object_faults(schema: dict[str, Any], value: Any, where: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where} is no table"]
    known, more = schema.get("properties", {}), schema["additionalProperties"]
    found = [f"{where}.{key} is missing" for key in schema.get("required", []) if key not in value]
    for key, one in value.items():
        if key in known or more:
            found += faults(known.get(key, more), one, f"{where}.{key}")
        else:
            found.append(f"{where}.{key} is not in the schema")
    return found


def load(name: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((SCHEMAS / f"{name}.json").read_text())
    return table
