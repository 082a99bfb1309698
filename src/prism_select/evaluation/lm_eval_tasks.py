"""Tasks: benchmarks of lm-eval (the Language Model Evaluation Harness).

    figures = {"arc_easy acc": 0.61, …}     every metric of a task, under lm-eval's own name

Choices made here:
- nothing of a benchmark is ours;
- a path among the tasks is a folder where the user's own tasks are defined, as --include_path of
  lm-eval;
- the network is given as it is in memory, so no checkpoint is written.
"""

import io
from contextlib import redirect_stderr
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prism_select.data.pool import fingerprint
from prism_select.models.causal_lm import CausalLM
from prism_select.run.errors import BadOption

__all__ = ["fingerprints_of", "task_figures", "task_names"]

ROWS = 8  # in a batch
INSTALL = "--tasks needs lm-eval; install PRISM with its extra [tasks]"


@cache
def task_names(tasks: tuple[str, ...]) -> tuple[list[str], Any]:
    """The names among `tasks`, without folders, and lm-eval's manager that has them.

    Raises BadOption for a name that lm-eval does not have, and without lm-eval.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise BadOption(INSTALL) from None
    folders = [name for name in tasks if Path(name).is_dir()]
    with redirect_stderr(io.StringIO()):
        manager = TaskManager(include_path=folders or None)
    names = [name for name in tasks if name not in folders]
    for name in names:
        if not manager.match_tasks([name]):
            raise BadOption(
                f"--tasks {name}: lm-eval knows no such task; give the folder that defines it as "
                "well"
            )
    return names, manager


def fingerprints_of(tasks: tuple[str, ...]) -> list[str]:
    """What figures depend on beside the model: lm-eval's version, and the definitions in folders,
    but not the data that these name."""
    files = [
        str(path)
        for name in tasks
        for path in sorted(Path(name).rglob("*"))
        if path.suffix in (".yaml", ".py")
    ]
    return [version("lm_eval"), fingerprint(files)] if tasks else []


def task_figures(model: CausalLM, tokenizer: Any, tasks: tuple[str, ...]) -> dict[str, float]:
    """Every metric of every task, without standard errors."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    names, manager = task_names(tasks)
    with redirect_stderr(io.StringIO()):  # its progress bars
        harness = HFLM(pretrained=model.network, tokenizer=tokenizer, batch_size=ROWS)
        output = simple_evaluate(
            model=harness,
            tasks=names,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,
            verbosity=None,
        )
    return {
        f"{task} {metric.partition(',')[0]}": float(value)
        for task, metrics in output["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric and metric != "sample_len"
    }
