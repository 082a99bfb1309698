"""Labels: a column of the pool that says which rows are bad.

    bad: true, t, 1, yes, y, bad      good: false, f, 0, no, n, good      unknown: "", null, nan

Choices made here:
- a value that is neither is refused: a typing error must not change the figures.
"""

import reprlib

from prism_select.data.pool import Pool
from prism_select.run.errors import BadOption

__all__ = ["labels_of"]

_TRUE = {"true", "t", "1", "1.0", "yes", "y", "bad"}
_FALSE = {"false", "f", "0", "0.0", "no", "n", "good"}
_UNKNOWN = {"", "none", "null", "nan"}


def labels_of(field: str, pool: Pool) -> list[bool | None]:
    """Whether each row is labelled as bad; None where it has no label. Raises BadOption for another
    value, and where no row has a label."""
    labels = list[bool | None]()
    for raw in pool.raw():
        text = str((raw.fields or {}).get(field)).strip().lower()
        if text not in _TRUE | _FALSE | _UNKNOWN:
            value = reprlib.repr((raw.fields or {})[field])
            raise BadOption(
                f"--label-field {field}: {raw.file}:{raw.line} has {value}, neither true nor "
                "false; use true/false, yes/no, 1/0 or bad/good"
            )
        labels.append(None if text in _UNKNOWN else text in _TRUE)
    if not any(label is not None for label in labels):
        raise BadOption(
            f"--label-field {field}: no row of the pool has such a label; check its name"
        )
    return labels
