"""The commands as functions: same words, same defaults, same run folder.

    run = prism_select.select(model="M", pool=["pool.jsonl"], target="pairs.jsonl", out="RUN",
    budget="5%")

Choices made here: a function takes exactly the fields of its config, so nothing is said twice and
types are checked; nothing is printed. `plan` is the command line's --dry-run. A run and an
evaluation end with RUN/report.html."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ParamSpec, cast

from prism_select.run.config import RepairConfig, ScoreConfig, SelectConfig
from prism_select.run.config_evaluate import EvaluateConfig, ReportConfig
from prism_select.run.config_pairs import PairsConfig
from prism_select.run.errors import BadOption, DiskTrouble
from prism_select.run.progress import Progress, Silent
from prism_select.scoring.processes import is_main_process

if TYPE_CHECKING:
    from pathlib import Path

    from prism_select.commands.pairs import Made
    from prism_select.data.pairing import Accepts
    from prism_select.run.folder import Run
    from prism_select.scoring.cost_plan import Plan

__all__ = [
    "check_pairs",
    "evaluate",
    "execute",
    "execute_evaluation",
    "execute_pairs",
    "execute_report",
    "make_pairs",
    "plan",
    "repair",
    "score",
    "select",
    "write_report",
]

P = ParamSpec("P")


def execute(config: ScoreConfig, progress: Progress | None = None) -> "Run | Plan":
    """Runs what `config` says. Raises PrismError for everything that its user can mend."""
    if isinstance(config, SelectConfig) and config.select_from:
        from prism_select.commands.select_again import choose_again

        done: Run | Plan = choose_again(config, progress or Silent())
    else:
        from prism_select.commands.pipeline import run

        done = run(config, progress or Silent())
    if is_main_process() and not config.dry_run:
        path = cast("Run", done).path
        page = path / "report.html"
        if not page.exists() or page.stat().st_mtime < (path / "manifest.json").stat().st_mtime:
            _write_page(str(path), progress or Silent())
    return done


def _write_page(run: str, progress: Progress) -> None:
    """A run or an evaluation is complete without its page: a full disk is told, and does not undo
    it."""
    try:
        execute_report(ReportConfig(runs=(run,)))
    except DiskTrouble as error:
        progress.say(f"no page was written: {error}")


def execute_report(config: ReportConfig) -> "Path":
    """The page that was written. Raises PrismError for everything that its user can mend."""
    first, *others = config.runs
    if others:
        from prism_select.report.comparison_page import write_comparison

        return write_comparison(first, others[0], config.out)
    from prism_select.report.run_page import write_report

    return write_report(first, config.out)


def execute_pairs(
    config: PairsConfig, progress: Progress | None = None, accepts: "Accepts | None" = None
) -> "Made | dict[str, Any]":
    """The file that was made, or the diagnosis. Raises PrismError for everything that its user can
    mend."""
    from prism_select.commands import pairs as making

    if config.check:
        return making.check_pairs(config, progress or Silent())
    return making.make_pairs(config, progress or Silent(), accepts)


def execute_evaluation(config: EvaluateConfig, progress: Progress | None = None) -> dict[str, Any]:
    """What RUN/evaluation/evaluation.json says. Raises PrismError for everything that its user can
    mend."""
    from prism_select.evaluation import evaluate as evaluation
    from prism_select.evaluation import loggers as boards

    told = evaluation.evaluate(config, progress or Silent())
    _write_page(config.run, progress or Silent())
    if config.board:
        boards.show(config.board, config.run)
    return told


def evaluate(run: str, holdout: str, **options: Any) -> dict[str, Any]:
    """`prism evaluate RUN --holdout PAIRS`: figures, verdicts and controls, as in
    RUN/evaluation/evaluation.json."""
    return execute_evaluation(EvaluateConfig(run=run, holdout=holdout, **options))


def write_report(*runs: str, out: str = "") -> "Path":
    """`prism report RUN`, or `prism report RUN_A RUN_B`: the page that was written."""
    return execute_report(ReportConfig(runs=runs, out=out))


def make_pairs(
    file: str, how: str, out: str, accepts: "Accepts | None" = None, **options: Any
) -> "Made":
    """`prism pairs FILE --how … --out …`; `accepts(answer, right)` may take the place of the option
    `accept`."""
    return cast(
        "Made",
        execute_pairs(PairsConfig(file=file, how=how, out=out, **options), accepts=accepts),  # type: ignore[arg-type]
    )


def check_pairs(check: str, model: str, **options: Any) -> dict[str, Any]:
    """`prism pairs --check FILE --model M`: what a run's manifest says about its target, with its
    warnings."""
    return cast("dict[str, Any]", execute_pairs(PairsConfig(check=check, model=model, **options)))


def plan(config: ScoreConfig) -> "Plan":
    """What the run would cost: the engine is made, checked and timed on one batch; nothing is
    written."""
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
    verb.__doc__ = f"{make.__doc__}\n\nTakes the fields of the command's config by name: every option of `prism {name}`."
    return verb


score = _verb(ScoreConfig, "score")


select = _verb(SelectConfig, "select")


repair = _verb(RepairConfig, "repair")
