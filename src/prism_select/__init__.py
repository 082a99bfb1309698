"""PRISM: choose fine-tuning data by its influence on a behaviour that pairs of answers show.

select, repair, score      the commands, as functions that return a Run
evaluate                   does a choice help? the figures of `prism evaluate`
write_report               `prism report`: the page of a run, or of two
make_pairs, check_pairs    `prism pairs`: a file of pairs, or what one says
direction_of, scores       the method on a model and tensors in memory
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prism_select.api import (
        check_pairs,
        evaluate,
        make_pairs,
        repair,
        score,
        select,
        write_report,
    )
    from prism_select.core.likelihood import Batch
    from prism_select.run.errors import PrismError
    from prism_select.run.folder import Run
    from prism_select.scoring.in_memory import direction_of, scores

__all__ = [
    "Batch",
    "PrismError",
    "Run",
    "check_pairs",
    "direction_of",
    "evaluate",
    "make_pairs",
    "repair",
    "score",
    "scores",
    "select",
    "write_report",
]

_HOMES = {
    "Batch": "core.likelihood",
    "PrismError": "run.errors",
    "Run": "run.folder",
    "check_pairs": "api",
    "direction_of": "scoring.in_memory",
    "evaluate": "api",
    "make_pairs": "api",
    "repair": "api",
    "score": "api",
    "scores": "scoring.in_memory",
    "select": "api",
    "write_report": "api",
}


def __getattr__(name: str) -> Any:
    """Each name is fetched when first asked for, so that importing the package does not import
    torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
