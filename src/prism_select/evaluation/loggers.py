"""Boards: the curves of an evaluation for TensorBoard or Weights & Biases, where one of them is
installed.

    tensorboard    RUN/evaluation/tensorboard/METHOD-SEED        tensorboard --logdir RUN/evaluation/tensorboard
    wandb          a run METHOD-SEED in project `prism`, in a group of the run folder's name

Choices made here: what is shown is curves.parquet, one board run for each training. It is written
last of all, so that nothing is lost where a board fails, and again by the same command; curves that
are there already stay as they are."""

import hashlib
import importlib.util
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from prism_select.run.errors import BadOption

__all__ = ["known_board", "show"]

Curves = Mapping[
    str, Iterable[tuple[int, Mapping[str, float]]]
]  # of each training: steps, and what was measured there


def known_board(name: str) -> None:
    """Raises BadOption where it is not installed: a folder of that name is no package."""
    spec = importlib.util.find_spec(name) if name else None
    if name and (spec is None or spec.origin is None):
        raise BadOption(f"--board {name}: not installed; pip install {name}, or leave it out")


def curves_of(run: Path) -> Curves:
    curves = defaultdict[str, list[tuple[int, Mapping[str, float]]]](list)
    for row in pq.read_table(run / "evaluation" / "curves.parquet").to_pylist():
        training, step = f"{row.pop('method')}-{row.pop('seed')}", row.pop("step")
        curves[training].append(
            (step, {name: value for name, value in row.items() if math.isfinite(value)})
        )
    return curves


def tensorboard(run: Path) -> None:
    from torch.utils.tensorboard.writer import SummaryWriter

    folder = run / "evaluation" / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)
    for training, points in curves_of(run).items():
        writer: Any = SummaryWriter(str(folder / training))
        for step, values in points:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
        writer.close()


def wandb(run: Path) -> None:
    from wandb import init

    shared: dict[str, Any] = {
        "project": "prism",
        "group": run.resolve().name,
        "dir": str(run / "evaluation"),
    }
    for training, points in curves_of(run).items():
        once = hashlib.blake2b(
            f"{run.resolve()} {training} {points}".encode(), digest_size=8
        ).hexdigest()
        board = init(**shared, name=training, id=once, resume="allow")
        for step, values in points:
            board.log(values, step=step)
        board.finish()


BOARDS: Mapping[str, Callable[[Path], None]] = {"tensorboard": tensorboard, "wandb": wandb}


def show(name: str, run: str) -> None:
    """Raises BadOption with what the board says where it fails."""
    try:
        BOARDS[name](Path(run))
    except Exception as error:  # every board has its own ways to fail
        what = " ".join(str(error).split())[:300] or type(error).__name__
        advice = "the evaluation is complete, and the same command tries the board again"
        raise BadOption(f"--board {name}: {what}; {advice}") from None
