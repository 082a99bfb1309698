"""Fields: the columns of a row under the standard names, as --fields maps them.

    --fields prompt=ask,prompt=question       {"prompt": ("ask", "question")}
    {"question": "Q?", "id": 7}             → {"prompt": "Q?", "id": 7}

Choices made here:
- of several columns for one field, the first that a row has counts;
- `a.b` is the column b in the object a, unless a column is called `a.b`;
- a mapped column hides the column of the standard name; a row without it is left as it is.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

from prism_select.data.records import Raw

__all__ = ["Fields", "Names", "columns_of", "explicit_id", "standard_fields"]

Names: TypeAlias = Mapping[str, Sequence[str]]  # field → columns
Fields: TypeAlias = Mapping[str, object]  # column → value

_AS_NAMED: Names = MappingProxyType({})
_MISSING = object()


def columns_of(fields: Fields, mapping: Names) -> dict[str, str]:
    """The column of each mapped field that this row has."""
    present = {
        name: [column for column in columns if _value_at(fields, column) is not _MISSING]
        for name, columns in mapping.items()
    }
    return {name: columns[0] for name, columns in present.items() if columns}


def _value_at(fields: Fields, column: str) -> object:
    outer, dot, inner = column.partition(".")
    if column in fields or not dot:
        return fields.get(column, _MISSING)
    value = fields.get(outer)
    return _value_at(value, inner) if isinstance(value, Mapping) else _MISSING


def standard_fields(fields: Fields, mapping: Names) -> dict[str, object]:
    """The values of a row by standard name; `answerKey` is also an `answer`."""
    columns = columns_of(fields, mapping) if mapping else {}
    standard = {
        name: value
        for name, value in fields.items()
        if name not in columns and name not in columns.values()
    }
    standard.update((name, _value_at(fields, column)) for name, column in columns.items())
    if "answer" not in standard and "answerKey" in standard:
        standard["answer"] = standard["answerKey"]
    return standard


def explicit_id(raw: Raw, mapping: Names = _AS_NAMED) -> str | None:
    """The id in the row itself, if any; it may occur once in a pool."""
    value = standard_fields(raw.fields or {}, mapping).get("id")
    return str(value) if type(value) in (int, str) and str(value).strip() else None
