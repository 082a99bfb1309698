"""The commands as functions: same words, same defaults, same run folder, for files and for objects.

    run = prism_select.select("MODEL", "pool.jsonl", "pairs.jsonl", out="RUN", budget="5%")
    run = prism_select.select(model, pool=dataset, target=pairs, tokenizer=tokenizer, budget=0.05)

Choices made here:
- a function takes every option of its command by name; a model, a pool, a target or a hold-out may
  be a loaded model, a Dataset, a list of dicts or a data frame in place of a path;
- an object gets an address (`memory:pool`) under which everything else reads it like a file;
- a loaded model is given back as it came: its mode and which parameters require gradients;
- nothing is printed; a run and an evaluation end with RUN/report.html.
"""

import inspect
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast, get_type_hints

from prism_select.data.object_rows import is_rows, refuse_object
from prism_select.run.config import RepairConfig, ScoreConfig, SelectConfig, keeping_given
from prism_select.run.config_evaluate import EvaluateConfig, ReportConfig
from prism_select.run.config_pairs import PairsConfig
from prism_select.run.errors import BadOption, DiskTrouble
from prism_select.run.objects import MEMORY, ModelObject, in_reach, is_object
from prism_select.run.options import Options, options_of
from prism_select.run.progress import Progress, Silent
from prism_select.scoring.processes import is_main_process, is_single_process

if TYPE_CHECKING:
    from prism_select.commands.pairs import MadePairs
    from prism_select.data.pairing import Accepts
    from prism_select.result import Run
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

Model: TypeAlias = Any  # a path, a hub id, or a loaded Hugging Face (or PEFT) model
Rows: TypeAlias = Any  # a path, several, a Dataset, a list of dicts, a data frame or an Arrow table
Config = TypeVar("Config", bound=Options)
AMOUNTS = ("budget", "remove", "per_source", "max_bad", "warmup")


@dataclass
class _Arguments:
    """What a caller gave: options as text, and the objects that some of them are addresses of."""

    options: dict[str, Any]
    objects: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in AMOUNTS:
            value = self.options.get(name)
            if isinstance(value, float) and 0 < value <= 1:  # 0.05 → 5%
                self.options[name] = f"{100 * value:.9g}%"
        if isinstance(fields := self.options.get("fields"), Mapping):
            self.options["fields"] = ",".join(
                f"{name}={column}"
                for name, columns in fields.items()
                for column in ([columns] if isinstance(columns, str) else columns)
            )

    def add_model(self, model: Model, tokenizer: Any) -> None:
        if model is None or isinstance(model, str | Path):
            if tokenizer is not None:
                raise BadOption("tokenizer: only a loaded model takes one; a folder has its own")
            self.options["model"] = model
            return
        if tokenizer is None:
            raise BadOption("tokenizer is missing: give the one that belongs to the loaded model")
        if not hasattr(model, "get_output_embeddings"):
            raise BadOption(
                f"model: a {type(model).__name__} is no causal language model; give one of Hugging "
                "Face, or its folder"
            )
        usual = {"adapter": None, "dtype": "auto", "device": "auto", "device_map": "none"}
        for name, value in {**usual, "quantize": "none", "warmup": None}.items():
            if self.options.get(name) not in (None, value):
                raise BadOption(
                    f"{name}: a loaded model is taken as it is; save it and give its folder, or "
                    f"leave {name} out"
                )
        if hasattr(model, "peft_config"):
            self.options["adapter"] = f"{MEMORY}model"
        self.options["model"] = f"{MEMORY}model"
        self.objects[f"{MEMORY}model"] = ModelObject(model, tokenizer)

    def add_rows(self, name: str, rows: Rows) -> Any:
        """What the option says for these rows: paths as they are, an object as its address."""
        if rows is None or isinstance(rows, str | Path):
            return rows
        if is_rows(rows) or not isinstance(rows, Sequence):
            refuse_object(name, rows)
            self.objects[f"{MEMORY}{name}"] = rows
            return f"{MEMORY}{name}"
        return [
            self.add_rows(name if len(rows) == 1 else f"{name}-{index}", one)
            for index, one in enumerate(rows)
        ]

    def add_targets(self, target: Rows | Mapping[str, Rows]) -> Any:
        """Several targets by name: {"math": pairs, "code": "code.jsonl"}."""
        if not isinstance(target, Mapping):
            return self.add_rows("target", target)
        return [f"{name}={self.add_rows(f'target-{name}', rows)}" for name, rows in target.items()]


@contextmanager
def _lent(arguments: _Arguments, uses_ray: bool = False) -> Iterator[None]:
    """Within the block the objects are in reach. Raises BadOption where other processes would need
    them. A loaded model is afterwards in the mode that it came in."""
    if arguments.objects and (uses_ray or not is_single_process()):
        raise BadOption(
            "objects in memory are in reach of one process alone; save them, and give their files"
        )
    with in_reach(arguments.objects):
        lent = arguments.objects.get(f"{MEMORY}model")
        if lent is None:
            yield
            return
        from prism_select.models.causal_lm import unchanged
        from prism_select.models.devices import without_accelerate

        with without_accelerate(lent.network), unchanged(lent.network):
            yield


def execute(config: ScoreConfig, progress: Progress | None = None) -> "Run | Plan":
    """Runs what `config` says. Raises PrismError for everything that its user can mend."""
    from prism_select.result import Run
    from prism_select.run.folder import Run as RunFiles

    progress = progress or Silent()
    if isinstance(config, SelectConfig) and config.select_from:
        from prism_select.commands.select_again import choose_again

        result: RunFiles | Plan = choose_again(config, progress)
    elif config.checkpoint:
        from prism_select.commands.checkpoints import run_checkpoints

        result = run_checkpoints(config, progress)
    else:
        from prism_select.commands.pipeline import run

        result = run(config, progress)
    if not isinstance(result, RunFiles):
        return result
    if is_main_process():
        page, manifest = result.path / "report.html", result.path / "manifest.json"
        if not page.exists() or page.stat().st_mtime < manifest.stat().st_mtime:
            _write_page(str(result.path), progress)
    return Run(result.path)


def _write_page(run: str, progress: Progress) -> None:
    """A run or an evaluation is complete without its page: a full disk is reported, and does not
    undo it."""
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
) -> "MadePairs | dict[str, Any]":
    """The file that was made, or the diagnosis. Raises PrismError for everything that its user can
    mend."""
    from prism_select.commands import pairs

    if config.check:
        return pairs.check_pairs(config, progress or Silent())
    if config.how == "before-after":
        from prism_select.commands.before_after import pairs_before_after

        return pairs_before_after(config, progress or Silent(), accepts)
    return pairs.make_pairs(config, progress or Silent(), accepts)


def execute_evaluation(config: EvaluateConfig, progress: Progress | None = None) -> dict[str, Any]:
    """What RUN/evaluation/evaluation.json says. Raises PrismError for everything that its user can
    mend."""
    from prism_select.evaluation.evaluate import evaluate

    figures = evaluate(config, progress or Silent())
    _write_page(str(config.run), progress or Silent())
    return figures


def plan(config: ScoreConfig) -> "Plan":
    """What the run would cost: the engine is made, checked and timed on one batch; nothing is
    written."""
    if isinstance(config, SelectConfig) and config.select_from:
        raise BadOption("select_from needs no plan: it reads scores that are there")
    return cast("Plan", execute(replace(config, dry_run=True)))


def _run(
    kind: type[ScoreConfig],
    model: Model,
    pool: Rows,
    target: Rows | Mapping[str, Rows],
    tokenizer: Any,
    options: dict[str, Any],
) -> "Run":
    from prism_select.result import Run

    if options.get("dry_run"):
        raise BadOption(
            "dry_run belongs to the command line; in Python, prism_select.api.plan(config) returns "
            "the plan"
        )
    arguments, earlier = _Arguments(dict(options)), options.get("select_from")
    if isinstance(earlier, Run):  # its pool is at hand
        arguments.options["select_from"] = str(earlier.path)
        arguments.objects |= earlier.objects
    arguments.add_model(model, tokenizer)
    pools = arguments.add_rows("pool", pool)
    if pool is not None and not (earlier and _is_scored(arguments.options["select_from"], pools)):
        arguments.options["pool"] = pools
    if target is not None:
        arguments.options["target"] = arguments.add_targets(target)
    with _folder(options.get("out")) as out:
        config = _config(kind, {**arguments.options, "out": out})
        with _lent(arguments, config.uses_ray):
            execute(config)
    run = Run(out, arguments.objects)
    if not options.get("out"):
        weakref.finalize(run, shutil.rmtree, out, ignore_errors=True)
    return run


def _is_scored(earlier: str | Path, pools: Any) -> bool:
    """Whether these are the objects that the scores of an earlier run are of."""
    from prism_select.result import Run

    manifest = Run(earlier).manifest
    scored = manifest.get("scored_by", manifest["config"])["pool"]
    given = [pools] if isinstance(pools, str | Path) else pools
    return all(map(is_object, given)) and list(given) == list(scored)


@contextmanager
def _folder(out: str | Path | None) -> Iterator[str]:
    """`out`, or a temporary folder, which an error leaves no trace of."""
    if out:
        yield str(out)
        return
    folder = mkdtemp(prefix="prism-")
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _config(kind: type[Config], options: Mapping[str, Any]) -> Config:
    given = {name: value for name, value in options.items() if value is not None}
    known = inspect.signature(kind).parameters
    for name in given.keys() - known.keys():
        close = get_close_matches(name, known, 1)
        advice = f"; did you mean {close[0]}?" if close else ""
        raise TypeError(f"{kind.command} has no option {name}{advice}")
    return kind(**keeping_given(kind, given, given))


def score(
    model: Model = None,
    pool: Rows = None,
    target: Rows | Mapping[str, Rows] = None,
    *,
    tokenizer: Any = None,
    **options: Any,
) -> "Run":
    """Score every row of a pool by how much training on it would raise the gain on the pairs."""
    return _run(ScoreConfig, model, pool, target, tokenizer, options)


def select(
    model: Model = None,
    pool: Rows = None,
    target: Rows | Mapping[str, Rows] = None,
    *,
    tokenizer: Any = None,
    **options: Any,
) -> "Run":
    """Choose the part of a pool that is worth training on: the highest scores under a budget."""
    return _run(SelectConfig, model, pool, target, tokenizer, options)


def repair(
    model: Model = None,
    pool: Rows = None,
    target: Rows | Mapping[str, Rows] = None,
    *,
    tokenizer: Any = None,
    **options: Any,
) -> "Run":
    """Remove the rows that push a model towards the rejected answers of the pairs."""
    return _run(RepairConfig, model, pool, target, tokenizer, options)


def evaluate(
    run: "Run | str | Path",
    holdout: Rows,
    *,
    model: Model = None,
    pool: Rows = None,
    target: Rows | Mapping[str, Rows] = None,
    tokenizer: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """`prism evaluate RUN --holdout PAIRS`: figures, verdicts and controls, as in
    RUN/evaluation/evaluation.json. A run that was made from objects knows them while its `Run`
    lives; opened from its folder, it needs them again, as model, tokenizer, pool and target."""
    from prism_select.result import Run

    arguments = _Arguments(dict(options), dict(run.objects) if isinstance(run, Run) else {})
    for name, value in {"model": model, "pool": pool, "target": target}.items():
        if isinstance(value, str | Path):
            raise BadOption(
                f"{name}: evaluate takes that of the run; leave it out, or give an object"
            )
    arguments.add_model(model, tokenizer)
    arguments.options.pop("model")
    arguments.add_rows("pool", pool)
    arguments.add_targets(target)
    path = run.path if isinstance(run, Run) else run
    values = {**arguments.options, "holdout": arguments.add_rows("holdout", holdout), "run": path}
    config = _config(EvaluateConfig, values)
    with _lent(arguments):
        return execute_evaluation(config)


def write_report(*runs: "Run | str | Path", out: str | Path | None = None) -> "Path":
    """`prism report RUN`, or `prism report RUN_A RUN_B`: the page that was written."""
    from prism_select.result import Run

    objects = {k: v for run in runs if isinstance(run, Run) for k, v in run.objects.items()}
    paths = tuple(str(run.path if isinstance(run, Run) else run) for run in runs)
    with in_reach(objects):
        return execute_report(_config(ReportConfig, {"runs": paths, "out": out}))


def make_pairs(
    file: Rows,
    how: str,
    out: str | Path | None = None,
    accepts: "Accepts | None" = None,
    *,
    model: Model = None,
    tokenizer: Any = None,
    **options: Any,
) -> "MadePairs":
    """`prism pairs FILE --how … --out …`; `accepts(answer, right)` may take the place of the
    option `accept`. `file` may be an object with rows; without `out` the pairs are read with
    `.read()` and their file goes with the result."""
    arguments = _Arguments({**options, "how": how})
    arguments.add_model(model, tokenizer)
    arguments.options["file"] = arguments.add_rows("rows", file)
    with _folder(out) as path:
        path = path if out else f"{path}/pairs.jsonl"
        config = _config(PairsConfig, {**arguments.options, "out": path})
        with _lent(arguments):
            made = cast("MadePairs", execute_pairs(config, accepts=accepts))
    if not out:
        weakref.finalize(made, shutil.rmtree, made.path.parent, ignore_errors=True)
    return made


def check_pairs(
    check: Rows, model: Model, *, tokenizer: Any = None, **options: Any
) -> dict[str, Any]:
    """`prism pairs --check FILE --model M`: what a run's manifest says about its target, with its
    warnings. `check` may be an object with rows."""
    arguments = _Arguments(dict(options))
    arguments.add_model(model, tokenizer)
    arguments.options["check"] = arguments.add_rows("pairs", check)
    config = _config(PairsConfig, arguments.options)
    with _lent(arguments):
        return cast("dict[str, Any]", execute_pairs(config))


def _with_options(function: Callable[..., Any], kind: type[Options]) -> None:
    """Shows every option of a command in the function's signature, and what it does in the
    docstring, for help() and completion."""
    own = list(inspect.signature(function).parameters.values())
    names, types = {parameter.name for parameter in own}, get_type_hints(kind)
    options = [option for option in options_of(kind) if option.name not in names]
    more = [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=types[option.name],
        )
        for option in options
    ]
    function.__signature__ = inspect.Signature([*own[:-1], *more])  # type: ignore[attr-defined]
    told = "\n".join(f"    {option.name}: {option.help}" for option in options)
    text = f"Takes every option of `prism {kind.command}` by name:\n\n{told}\n"
    function.__doc__ = f"{inspect.getdoc(function)}\n\n{text}"


_with_options(score, ScoreConfig)
_with_options(select, SelectConfig)
_with_options(repair, RepairConfig)
_with_options(evaluate, EvaluateConfig)
_with_options(make_pairs, PairsConfig)
_with_options(check_pairs, PairsConfig)
