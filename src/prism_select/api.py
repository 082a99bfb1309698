"""The commands as functions: same words, same defaults, same run folder.

    run = prism_select.select(model="M", pool=["pool.jsonl"], target="pairs.jsonl", out="RUN", budget="5%")

Choices made here: a function takes exactly the fields of its config, so nothing is said twice and types are checked;
nothing is printed. `plan` is the command line's --dry-run.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, ParamSpec, cast

from prism_select.config import RepairConfig, ScoreConfig, SelectConfig
from prism_select.errors import BadOption
from prism_select.progress import Progress, Silent

if TYPE_CHECKING:
    from prism_select.planning import Plan
    from prism_select.store import Run

__all__ = ["execute", "plan", "repair", "score", "select"]

P = ParamSpec("P")


def execute(config: ScoreConfig, progress: Progress | None = None) -> "Run | Plan":
    """Runs what `config` says. Raises PrismError for everything that its user can mend."""
    if isinstance(config, SelectConfig) and config.select_from:
        from prism_select.choice import choose_again

        return choose_again(config, progress or Silent())
    from prism_select.pipeline import run

    return run(config, progress or Silent())


def plan(config: ScoreConfig) -> "Plan":
    """What the run would cost: the engine is made, checked and timed on one batch; nothing is written."""
    if isinstance(config, SelectConfig) and config.select_from:
        raise BadOption("select_from needs no plan: it reads scores that are there")
    return cast("Plan", execute(replace(config, dry_run=True)))


def _verb(make: Callable[P, ScoreConfig], name: str) -> "Callable[P, Run]":
    def verb(*args: P.args, **options: P.kwargs) -> "Run":
        config = make(*args, **options)
        if config.dry_run:
            raise BadOption(
                "dry_run belongs to the command line; in Python, prism_select.api.plan(config) returns the plan"
            )
        return cast("Run", execute(config))

    verb.__name__ = verb.__qualname__ = name
    verb.__doc__ = (
        f"{make.__doc__}\n\nTakes the fields of the command's config by name: every option of `prism {name}`."
    )
    return verb


score = _verb(ScoreConfig, "score")
select = _verb(SelectConfig, "select")
repair = _verb(RepairConfig, "repair")
