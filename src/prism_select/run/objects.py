"""Objects: rows and models that a caller has in memory, under addresses that read like files.

    memory:pool     rows of a pool      memory:target    pairs      memory:holdout    held-out pairs
    memory:model    a network with its tokenizer

Choices made here:
- an object is in reach while the function that it was given to runs, in its thread alone;
- whatever takes a file name takes an address, so a run folder names objects as it names files;
- contents, not addresses, tell one object from another: both have fingerprints.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from prism_select.run.errors import BadOption

__all__ = ["MEMORY", "ModelObject", "in_reach", "is_object", "object_at"]

MEMORY = "memory:"
_IN_REACH: ContextVar[Mapping[str, Any]] = ContextVar("objects", default={})  # noqa: B039


@dataclass(frozen=True)
class ModelObject:
    """A loaded network, and the tokenizer that belongs to it."""

    network: Any
    tokenizer: Any


@contextmanager
def in_reach(objects: Mapping[str, Any]) -> Iterator[None]:
    """In the block, `object_at` knows these objects by their addresses, besides earlier ones."""
    token = _IN_REACH.set({**_IN_REACH.get(), **objects})
    try:
        yield
    finally:
        _IN_REACH.reset(token)


def is_object(name: str | None) -> bool:
    """Whether a name is an address of an object rather than a path (or memory://, fsspec's)."""
    return bool(name) and str(name).startswith(MEMORY) and not str(name).startswith("memory://")


def object_at(address: str) -> Any:
    """Raises BadOption for an address that no object was given for."""
    try:
        return _IN_REACH.get()[address]
    except KeyError:
        name = address.removeprefix(MEMORY)
        raise BadOption(
            f"{address}: this run was given its {name} as a Python object; call it from Python "
            f"again, with the same {name}"
        ) from None
