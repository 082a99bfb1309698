"""Tasks: benchmarks of lm-eval (the Language Model Evaluation Harness).

    figures = {"arc_easy acc": 0.61, …}     every metric of a task, under lm-eval's own name

Choices made here:
- nothing of a benchmark is ours;
- a question that a pair of the run's target asks is left out: its text stands in the pair's prompt
  or the other way round, word by word;
- a path among the tasks is a folder where the user's own tasks are defined, as --include_path of
  lm-eval;
- the network is given as it is in memory, so no checkpoint is written.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prism_select.data.pool import fingerprint
from prism_select.models.causal_lm import CausalLM
from prism_select.run.errors import BadOption

__all__ = ["TaskQuestions", "fingerprints_of", "questions_of", "task_figures", "task_names"]

ROWS = 8  # in a batch
INSTALL = "--tasks needs lm-eval; install PRISM with its extra [tasks]"


@dataclass(frozen=True)
class TaskQuestions:
    """`asked` numbers the questions of each task with some left out; `left_out` and `total` count
    those of every task."""

    asked: Mapping[str, Sequence[int]]
    left_out: Mapping[str, int]
    total: Mapping[str, int]


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


def questions_of(tasks: tuple[str, ...], seen: frozenset[str]) -> TaskQuestions:
    """Which questions of each task are not among those `seen`, whose words have one space between.

    Raises BadOption where a task has no other.
    """
    asked, left_out, total = dict[str, list[int]](), dict[str, int](), dict[str, int]()
    names, manager = task_names(tasks)
    with redirect_stderr(io.StringIO()):
        by_name = loaded_tasks(manager, names)
    for name, task in by_name.items():
        texts = [text_of(task, document) for document in task.eval_docs]
        rest = [number for number, text in enumerate(texts) if not is_seen(text, seen)]
        total[name], left_out[name] = len(texts), len(texts) - len(rest)
        if texts and not rest:
            raise BadOption(
                f"--tasks {name}: all of its {len(texts)} questions are in the run's target; make "
                "pairs of some of them, and leave the others for the evaluation"
            )
        if left_out[name]:
            asked[name] = rest
    return TaskQuestions(asked, left_out, total)


def loaded_tasks(manager: Any, names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's tasks by name, those of groups too."""
    if hasattr(manager, "load"):
        return dict(manager.load(names)["tasks"])
    return dict(leaves_of(manager.load_task_or_group(names)))  # older lm-eval


def leaves_of(loaded: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, task in loaded.items():
        if isinstance(task, Mapping):
            yield from leaves_of(task)
        else:
            yield str(name), task


def text_of(task: Any, document: Any) -> str:
    """What the task asks; all texts of the document where it asks by the choices."""
    text = task.doc_to_text(document)
    if not isinstance(text, str):
        text = " ".join(value for value in document.values() if isinstance(value, str))
    return " ".join(text.split())


def is_seen(text: str, seen: frozenset[str]) -> bool:
    padded = f" {text} "
    return bool(text) and any(
        f" {question} " in padded or f" {question}".endswith(f" {text}") for question in seen
    )


def task_figures(
    model: CausalLM,
    tokenizer: Any,
    tasks: tuple[str, ...],
    questions: Mapping[str, Sequence[int]],
) -> dict[str, float]:
    """Every metric of every task, without standard errors, over the numbered questions of the tasks
    in `questions` and all of the others."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    names, manager = task_names(tasks)
    with redirect_stderr(io.StringIO()):  # its progress bars
        harness = HFLM(pretrained=model.network, tokenizer=tokenizer, batch_size=ROWS)
        output = simple_evaluate(
            model=harness,
            tasks=names,
            task_manager=manager,
            samples={name: list(numbers) for name, numbers in questions.items()} or None,
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
