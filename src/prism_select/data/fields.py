"""Fields: the columns of a row under the standard names, as --fields maps them.

    --fields prompt=ask,prompt=question       {"prompt": ("ask", "question")}
    {"question": "Q?", "id": 7}             → {"prompt": "Q?", "id": 7}

Choices made here:
- of several columns for one field, the first that a row has counts;
- `a.b` is the column b in the object a, unless a column is called `a.b`;
- a mapped column hides the column of the standard name; a row without it is left as it is;
- NaN is what data frames write where there is nothing: an empty cell, like null;
- an id or a source may be a whole number, also as a float: a column of integers with a gap becomes
  one of floats, and 1.0 is the id "1".
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

from prism_select.data.records import Raw

__all__ = [
    "Fields",
    "Names",
    "columns_of",
    "explicit_id",
    "is_blank",
    "is_empty",
    "name_in",
    "standard_fields",
    "without_nulls",
]

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


def is_empty(value: object) -> bool:
    """Whether a cell is null or NaN."""
    return value is None or (isinstance(value, float) and value != value)


def is_blank(value: object) -> bool:
    """Whether nothing stands in a cell: null, NaN, white space, or a list or an object of
    nothing."""
    if isinstance(value, str):
        return not value or value.isspace()
    return not value if isinstance(value, list | tuple | Mapping) else is_empty(value)


def without_nulls(value: Any) -> Any:
    """The value without the keys of objects, at any depth, that are null."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def name_in(value: object) -> str | None:
    """An id or a source as text; None for a value that is none."""
    if isinstance(value, str):
        return value
    if type(value) is int:
        return str(value)
    if isinstance(value, float) and abs(value) < 2**53 and value.is_integer():
        return str(int(value))
    return None


def explicit_id(raw: Raw, mapping: Names = _AS_NAMED) -> str | None:
    """The id in the row itself, if any; it may occur once in a file."""
    fields = raw.fields or {}
    value = standard_fields(fields, mapping).get("id") if mapping else fields.get("id")
    name = name_in(value)
    return name if name and name.strip() else None
