"""The commands as functions: same words, same defaults, same run folder.

    run = prism_select.select(model="M", pool=["pool.jsonl"], target="pairs.jsonl", out="RUN", budget="5%")

Choices made here: a function takes exactly the fields of its config, so nothing is said twice and types are checked;
nothing is printed; with `dry_run` the answer is a Plan.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec

from prism_select.config import RepairConfig, ScoreConfig, SelectConfig
from prism_select.progress import Progress, Silent

if TYPE_CHECKING:
    from prism_select.planning import Plan
    from prism_select.store import Run

__all__ = ["execute", "repair", "score", "select"]

P = ParamSpec("P")


def execute(config: ScoreConfig, progress: Progress | None = None) -> "Run | Plan":
    """Runs what `config` says. Raises PrismError for everything that its user can mend."""
    if isinstance(config, SelectConfig) and config.select_from:
        from prism_select.choice import choose_again

        return choose_again(config, progress or Silent())
    from prism_select.pipeline import run

    return run(config, progress or Silent())


def _verb(make: Callable[P, ScoreConfig], name: str) -> "Callable[P, Run | Plan]":
    def verb(*args: P.args, **options: P.kwargs) -> "Run | Plan":
        return execute(make(*args, **options))

    verb.__name__ = verb.__qualname__ = name
    verb.__doc__ = f"{make.__doc__}\n\n    Takes the fields of {make.__name__} by name.\n    "
    return verb


score = _verb(ScoreConfig, "score")
select = _verb(SelectConfig, "select")
repair = _verb(RepairConfig, "repair")
