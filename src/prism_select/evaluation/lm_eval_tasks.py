"""Tasks: benchmarks of lm-eval (the Language Model Evaluation Harness), for users who have them.

    figures = {"arc_easy acc": 0.61, …}     every metric that lm-eval gives of a task, under its own name

Choices made here: nothing of a benchmark is ours; a path among the tasks is a folder where tasks of
the user's own are defined, as lm-eval's --include_path. The network is given as it is in memory, so
no checkpoint is written."""

import io
from contextlib import redirect_stderr
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prism_select.data.pool import fingerprint
from prism_select.models.causal_lm import CausalLM
from prism_select.run.errors import BadOption

__all__ = ["fingerprints_of", "known_tasks", "task_figures"]

ROWS = 8


_INSTALL = "--tasks needs lm-eval; install PRISM with its extra [tasks]"


@cache
def known_tasks(given: tuple[str, ...]) -> tuple[list[str], Any]:
    """The names among `given`, and lm-eval's manager that knows them. Raises BadOption for a name
    that it does not know, and without lm-eval."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise BadOption(_INSTALL) from None
    folders = [name for name in given if Path(name).is_dir()]
    with redirect_stderr(io.StringIO()):
        manager = TaskManager(include_path=folders or None)
    names = [name for name in given if name not in folders]
    for name in names:
        if not manager.match_tasks([name]):
            raise BadOption(
                f"--tasks {name}: lm-eval knows no such task; give the folder that defines it as well"
            )
    return names, manager


def fingerprints_of(given: tuple[str, ...]) -> list[str]:
    """What their figures depend on beside the model: lm-eval's version, and what defines tasks in
    folders; not the data that these name."""
    files = [
        str(path)
        for name in given
        for path in sorted(Path(name).rglob("*"))
        if path.suffix in (".yaml", ".py")
    ]
    return [version("lm_eval"), fingerprint(files)] if given else []


def task_figures(model: CausalLM, tokenizer: Any, given: tuple[str, ...]) -> dict[str, float]:
    """Every metric of every task, without standard errors."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    names, manager = known_tasks(given)
    with redirect_stderr(io.StringIO()):  # its progress bars
        harness = HFLM(pretrained=model.network, tokenizer=tokenizer, batch_size=ROWS)
        found = simple_evaluate(
            model=harness,
            tasks=names,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,
            verbosity=None,
        )
    return {
        f"{task} {metric.partition(',')[0]}": float(value)
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric and metric != "sample_len"
    }
