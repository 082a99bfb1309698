"""Selecting again during training: one callback for TRL's SFTTrainer.

    step    0           12          24          36
    rows    round-1  →  round-2  →  round-3  →          each chosen by the model of its step

    rounds = Rounds(3, "out", pool=pool, target="pairs.jsonl", budget="5%")
    SFTTrainer(…, args=SFTConfig(max_steps=36, …), train_dataset=pool, callbacks=[rounds]).train()

Choices made here:
- the training set is the whole pool; the callback has the trainer's loader draw the chosen rows
  alone, in passes that are shuffled as the trainer shuffles epochs;
- which row is drawn follows from the choices and from the number of draws before, so a training
  that goes on from a checkpoint, with the same `out`, draws what it would have drawn;
- a new choice takes effect one batch late, with workers as many more as they make ahead: these
  batches are there when it is made;
- every choice is a run folder, `out/round-N`, and `out/steps.jsonl` names the rows of each step, as
  in the column `row` of scores.parquet; of two lines of one step the later counts.

Refused are epochs in place of `max_steps`, packing, streamed data sets, rows that TRL drops, other
samplers than the default, `auto_find_batch_size`, `ignore_data_skip`, several processes, DeepSpeed
and FSDP, and whatever `prism_select.select` refuses of a loaded model: quantised weights, say.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import count, islice
from math import ceil
from pathlib import Path
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler
from transformers import TrainerCallback

import prism_select

REFUSED = {
    "packing": "packed rows are not those of the pool",
    "auto_find_batch_size": "it begins again in the middle",
    "ignore_data_skip": "the next row follows from those before",
    "deepspeed": "a selection needs the whole model",
    "fsdp": "a selection needs the whole model",
}


class Chosen(Sampler[int]):
    """Passes over the chosen rows: `choices` are pairs of a draw and the rows from there on. What
    the trainer calls an epoch has `batches` of `size` draws; a step takes `accumulated` of them."""

    def __init__(self, batches: int, size: int, accumulated: int, seed: int) -> None:
        self.batches, self.size, self.accumulated, self.seed = batches, size, accumulated, seed
        self.choices, self.epoch = list[tuple[int, list[int]]](), 0

    def draws(self) -> Iterator[int]:
        """Rows of the pool from the first draw on, without end."""
        draw = 0
        for number in count():
            rows = self.rows_at(draw)
            order = SeedableRandomSampler(rows, data_seed=self.seed)
            order.set_epoch(number)
            for place in order:
                if self.rows_at(draw) is not rows:
                    break
                yield rows[place]
                draw += 1

    def rows_at(self, draw: int) -> list[int]:
        return [rows for first, rows in self.choices if first <= draw][-1]

    def draws_of(self, steps: int) -> int:
        """How many draws the first `steps` steps take; the last step of an epoch may take fewer."""
        epochs, more = divmod(steps, ceil(self.batches / self.accumulated))
        return (epochs * self.batches + more * self.accumulated) * self.size

    def __iter__(self) -> Iterator[int]:
        return islice(self.draws(), self.epoch * len(self), (self.epoch + 1) * len(self))

    def __len__(self) -> int:
        return self.batches * self.size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Rounds(TrainerCallback):  # type: ignore[misc]
    """Selects before the first step and again after others: `rounds` times in all at even
    distances, or after each of the given steps. `options` are those of `prism_select.select` but
    for model, tokenizer, out and overwrite. Raises ValueError for a training that it does not
    fit."""

    def __init__(self, rounds: int | Sequence[int], out: str | Path, **options: Any) -> None:
        self.rounds, self.out, self.options = rounds, Path(out), options

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        loader, step = objects["train_dataloader"], state.global_step
        refuse(args, loader)
        self.steps = steps_of(self.rounds, state.max_steps)
        if step == 0 and any(self.out.glob("round-*")):
            raise ValueError(
                f"{self.out}: there are rounds of another training; give another folder, or "
                "train(resume_from_checkpoint=…)"
            )
        size, seed = loader.total_batch_size, loader.batch_sampler.sampler.initial_seed
        self.late = size * (1 + loader.num_workers * (loader.prefetch_factor or 0))
        self.chosen = Chosen(len(loader), size, args.gradient_accumulation_steps, seed)
        loader.set_sampler(self.chosen)
        for past in (each for each in self.steps if each <= step):
            self.choose(past, objects, made=step > 0)
        self.trained = islice(self.chosen.draws(), self.chosen.draws_of(step), None)

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        step = state.global_step
        draws = self.chosen.draws_of(step) - self.chosen.draws_of(step - 1)
        line = {"step": step, "rows": list(islice(self.trained, draws))}
        with (self.out / "steps.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if step in self.steps:
            self.choose(step, objects)

    def choose(self, step: int, objects: Any, made: bool = False) -> None:
        """Draws, from now on, what the model chooses, or chose before the training was stopped."""
        folder = self.out / f"round-{self.steps.index(step) + 1}"
        if not made:
            options = {"out": folder, "tokenizer": objects["processing_class"], "overwrite": True}
            prism_select.select(objects["model"], **options, **self.options)
        verdicts = prism_select.Run(folder).scores["verdict"].to_pylist()
        rows = [row for row, verdict in enumerate(verdicts) if verdict == "selected"]
        if (here := len(objects["train_dataloader"].dataset)) != len(verdicts):
            raise ValueError(
                f"train_dataset has {here} rows and the pool {len(verdicts)}: give the same rows "
                "in the same order; TRL drops those that max_length leaves no supervised token"
            )
        if not rows:
            raise ValueError(f"{folder}: no row was chosen; give a larger budget")
        self.chosen.choices.append((step and self.chosen.draws_of(step) + self.late, rows))


def steps_of(rounds: int | Sequence[int], last: int) -> list[int]:
    """The steps after which rows are chosen, the first one 0."""
    if isinstance(rounds, int):
        steps = [last * number // rounds for number in range(rounds)]
    else:
        steps = [0, *rounds]
    if not steps or steps != sorted({*steps}) or steps[-1] >= last:
        raise ValueError(f"rounds={rounds!r}: give fewer, or rising steps below max_steps={last}")
    return steps


def refuse(args: Any, loader: Any) -> None:
    """Raises ValueError where steps or rows would not be those of the pool."""
    for name, why in REFUSED.items():
        if getattr(args, name, None):
            raise ValueError(f"{name}: {why}; leave it out")
    if args.max_steps < 1:
        raise ValueError("max_steps is missing: an epoch would be one of the whole pool")
    if args.world_size > 1:
        raise ValueError(f"{args.world_size} processes: a selection during training needs one")
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if type(sampler) is not SeedableRandomSampler:
        raise ValueError(
            f"rows are drawn by {type(sampler).__name__}, not at random from a Dataset: leave out "
            "train_sampling_strategy and accelerator_config, and stream nothing"
        )
