"""TODO."""

import reprlib

from prism_select.data.pool import Pool
from prism_select.run.errors import BadOption

__all__ = ["labels_of"]

_TRUE, _FALSE = (
    {"true", "t", "1", "1.0", "yes", "y", "bad"},
    {"false", "f", "0", "0.0", "no", "n", "good"},
)


_UNKNOWN = {"", "none", "null", "nan"}


def labels_of(field: str, pool: Pool) -> list[bool | None]:
    """Whether each row is known to be bad; None where it does not say. Raises BadOption for what is
    neither true nor false, and where no row says."""
    labels = list[bool | None]()
    for raw in pool.raw():
        text = str((raw.fields or {}).get(field)).strip().lower()
        if text not in _TRUE | _FALSE | _UNKNOWN:
            found = reprlib.repr((raw.fields or {})[field])
            raise BadOption(
                f"--label-field {field}: {raw.file}:{raw.line} has {found}, neither true nor false; use true/false, "
                "yes/no, 1/0 or bad/good"
            )
        labels.append(None if text in _UNKNOWN else text in _TRUE)
    if not any(label is not None for label in labels):
        raise BadOption(
            f"--label-field {field}: no row of the pool has such a label; check its name"
        )
    return labels
