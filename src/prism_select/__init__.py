"""PRISM: choose fine-tuning data by its influence on a behaviour that pairs of answers show.

select, repair, score      the commands, as functions that return a Run
evaluate                   does a choice help? the figures of `prism evaluate`
write_report               `prism report`: the page of a run, or of two
make_pairs, check_pairs    `prism pairs`: a file of pairs, or what one says
target_direction, score_tensors    the method on a model and tensors in memory
Run                        a complete run folder: scores, manifest, selected rows, page
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
    from prism_select.result import Run
    from prism_select.run.errors import PrismError
    from prism_select.scoring.in_memory import score_tensors, target_direction

__all__ = [
    "Batch",
    "PrismError",
    "Run",
    "check_pairs",
    "evaluate",
    "make_pairs",
    "repair",
    "score",
    "score_tensors",
    "select",
    "target_direction",
    "write_report",
]

_HOMES = {
    "Batch": "core.likelihood",
    "PrismError": "run.errors",
    "Run": "result",
    "check_pairs": "api",
    "evaluate": "api",
    "make_pairs": "api",
    "repair": "api",
    "score": "api",
    "score_tensors": "scoring.in_memory",
    "select": "api",
    "target_direction": "scoring.in_memory",
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
