"""TODO."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

from prism_select.data.records import Raw

__all__ = ["Fields", "Names", "columns_of", "explicit_id", "standard_fields"]

Names: TypeAlias = Mapping[
    str, Sequence[str]
]  # of each field, its columns: the first that a row has counts


Fields: TypeAlias = Mapping[str, object]


_AS_NAMED: Names = MappingProxyType({})


_NOWHERE = object()


def columns_of(fields: Fields, mapping: Names) -> dict[str, str]:
    """Of each field that is mapped to a column of this row, the column: `a.b` is b in the object
    a."""
    found = {
        name: [c for c in columns if _at(fields, c) is not _NOWHERE]
        for name, columns in mapping.items()
    }
    return {name: columns[0] for name, columns in found.items() if columns}


def _at(fields: Fields, column: str) -> object:
    outer, dot, inner = column.partition(".")
    if column in fields or not dot:
        return fields.get(column, _NOWHERE)
    held = fields.get(outer)
    return _at(held, inner) if isinstance(held, Mapping) else _NOWHERE


def standard_fields(fields: Fields, mapping: Names) -> dict[str, object]:
    """The fields under their standard names; where a row lacks a mapped column, its names stay as
    they are."""
    used = columns_of(fields, mapping) if mapping else {}
    named = {
        name: value
        for name, value in fields.items()
        if name not in used and name not in used.values()
    }
    named.update((name, _at(fields, column)) for name, column in used.items())
    if "answer" not in named and "answerKey" in named:
        named["answer"] = named["answerKey"]
    return named


def explicit_id(raw: Raw, mapping: Names = _AS_NAMED) -> str | None:
    """The id that the row itself carries, if any: what must not occur twice in a pool."""
    value = standard_fields(raw.fields or {}, mapping).get("id")
    return str(value) if type(value) in (int, str) and str(value).strip() else None
