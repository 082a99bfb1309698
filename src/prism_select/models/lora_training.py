"""Warm-up: a short LoRA fine-tuning on a random part of the pool, so that direction and scores are
taken at a checkpoint that has learned the pool's format already and sees what is left to learn.

    network ← network + merged adapter          RUN/adapter keeps the adapter, for stock PEFT

Choices made here: TRL's trainer and PEFT's LoRA with their usual settings (rank 16, all linear
layers, one epoch, 2e-4 falling to 0), since nothing about this step is ours, but for the loss: it
is that of core/likelihood.py, which runs the output head on supervised tokens alone; a run that was
stopped takes the adapter that it left."""

import math
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prism_select.core.likelihood import Batch, backward
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.records import Example
from prism_select.models.adapters import WEIGHTS, load_adapter
from prism_select.models.causal_lm import CausalLM
from prism_select.models.loading import LoadedModel
from prism_select.run.errors import BadOption, BadRow

__all__ = [
    "ADAPTER",
    "QUIET",
    "RATE",
    "ROWS_A_STEP",
    "TrainingSettings",
    "drawn",
    "has_adapter",
    "train",
    "warm_up",
    "with_adapter",
]

ADAPTER = "adapter"


RANK, RATE, ROWS_A_STEP = 16, 2e-4, 8


QUIET: Mapping[
    str, Any
] = {  # of a trainer that keeps and shows nothing, in the dtype of the weights
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


_INSTALL = "this needs PEFT and TRL; install PRISM with its extra [train]"


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast a training goes: `steps` of `ROWS_A_STEP` rows, or one pass over the
    rows where 0. The seed draws the adapter and the order of the rows; `full` trains all weights
    and makes no adapter."""

    seed: int
    steps: int = 0
    rate: float = RATE
    full: bool = False


def drawn(
    examples: Iterable[Example | BadRow], encoder: Encoder, share: float, seed: int
) -> list[Encoded]:
    """A random share of the rows that can be encoded."""
    draw, rows = random.Random(seed), list[Encoded]()
    for example in examples:
        if draw.random() < share and isinstance(example, Example):
            with suppress(BadRow):
                rows.append(encoder.encode(example))
    return rows


def refuse_many_gpus(device: torch.device) -> None:
    """Raises BadOption where TRL would spread a training over all GPUs that it sees."""
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        raise BadOption(
            "training takes one GPU, and several are visible; name one in CUDA_VISIBLE_DEVICES"
        )


def has_adapter(folder: Path) -> bool:
    return (folder / WEIGHTS).exists()


def with_adapter(loaded: LoadedModel, folder: Path) -> LoadedModel:
    """The model with the adapter of a folder merged into its weights."""
    return replace(loaded, model=load_adapter(loaded.model.network, folder, merge=True))


def warm_up(loaded: LoadedModel, rows: Sequence[Encoded], seed: int) -> tuple[LoadedModel, Path]:
    """The model with a new adapter, trained on `rows`, in its weights, and a temporary folder with
    the adapter. Raises BadOption without TRL and PEFT, or without rows."""
    if not rows:
        raise BadOption("--warmup drew no row of this pool; raise its share")
    folder = Path(tempfile.mkdtemp(prefix="prism-warmup-"))
    try:
        adapted = train(loaded.model, loaded.encoder.tokenizer, rows, TrainingSettings(seed))
        adapted.save_pretrained(str(folder))
        return replace(loaded, model=CausalLM(adapted.merge_and_unload())), folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def train(
    model: CausalLM,
    tokenizer: Any,
    rows: Sequence[Encoded],
    course: TrainingSettings,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Any:
    """The network of the model, changed in place, with an adapter on it (or whole), trained on the
    supervised tokens of `rows`: PEFT's model (or the network itself). `on_step` is told the number
    of each step that was made, from 1, and its mean loss in nats per token. Raises BadOption
    without TRL and PEFT."""
    refuse_many_gpus(model.device)
    try:
        from datasets import Dataset, disable_progress_bars
        from huggingface_hub import constants
        from peft import LoraConfig, get_peft_model
        from transformers import PrinterCallback
        from trl.trainer.sft_config import SFTConfig
    except ImportError:
        raise BadOption(_INSTALL) from None

    constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL would tell the hub of every training
    disable_progress_bars()
    torch.manual_seed(course.seed)
    network: Any = model.network
    plan = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    learner = network.requires_grad_(True) if course.full else get_peft_model(network, plan)
    coded = [
        {
            "input_ids": list(row.tokens),
            "labels": [
                t if learned else -100
                for t, learned in zip(row.tokens, row.supervised, strict=True)
            ],
        }
        for row in rows
    ]
    with tempfile.TemporaryDirectory(prefix="prism-training-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names of settings that are about to change
        settings = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=ROWS_A_STEP,
            num_train_epochs=1,
            max_steps=course.steps or -1,
            learning_rate=course.rate,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            use_cpu=model.device.type == "cpu",
            seed=course.seed,
            **QUIET,
        )
        data = Dataset.from_list(coded)
        trainer = _trainer(model, on_step)(
            model=learner, args=settings, train_dataset=data, processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return learner


def _trainer(model: CausalLM, on_step: Callable[[int, float], None]) -> Any:
    """TRL's trainer with the loss of core/likelihood.py."""
    from transformers import TrainerCallback
    from trl.trainer.sft_trainer import SFTTrainer

    class Telling(TrainerCallback):  # type: ignore[misc]
        loss = math.nan

        def on_step_end(self, _: Any, state: Any, control: Any, **named: Any) -> None:
            on_step(state.global_step, self.loss)

    class Trainer(SFTTrainer):
        def __init__(self, **given: Any) -> None:
            self.telling = Telling()
            super().__init__(**given, callbacks=[self.telling])

        def training_step(
            self, network: Any, inputs: Any, num_items_in_batch: Any = None
        ) -> torch.Tensor:
            network.train()
            tokens, real, labels = (
                inputs[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")
            )
            batch = Batch(tokens, real.bool(), labels >= 0)
            share = torch.full(
                (len(batch),), 1 / max(1, int(batch.counts.sum())), device=model.device
            )
            loss = -(backward(model, batch, -share) * share).sum()
            self.telling.loss = float(loss)
            return loss

    return Trainer
