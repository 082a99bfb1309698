"""LoRA training: fine-tune a model on rows, for a warm-up before scoring and for evaluations.

    network ← network + merged adapter          RUN/adapter keeps the adapter, for stock PEFT

Choices made here:
- TRL's trainer and PEFT's LoRA with their usual settings: rank 16, all linear layers, one epoch, a
  learning rate of 2e-4 that falls to 0;
- but the loss is that of core/likelihood.py, which runs the head on supervised tokens alone;
- a model over several GPUs stays where it is (trained on none so far: there was no such machine); a
  part on the processor is refused;
- a warm-up takes a random share of the pool, so that direction and scores are taken at a
  checkpoint that has learned the pool's format;
- a run that was stopped takes the adapter in its folder, and does not train again.
"""

import math
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prism_select.core.likelihood import Batch, backward
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.records import Example
from prism_select.models.adapters import load_adapter
from prism_select.models.causal_lm import CausalLM
from prism_select.models.devices import connect
from prism_select.models.layer_selection import adapter_names
from prism_select.models.loading import LoadedModel
from prism_select.models.merging import merged, random_tokens
from prism_select.run.adapter_base import WEIGHTS
from prism_select.run.errors import BadOption, BadRow

__all__ = [
    "ADAPTER",
    "QUIET",
    "RATE",
    "ROWS_A_STEP",
    "TrainingSettings",
    "has_adapter",
    "random_rows",
    "refuse_apart",
    "refuse_many_gpus",
    "train",
    "warm_up",
    "with_adapter",
]

ADAPTER = "adapter"  # folder in the run folder
RANK, RATE, ROWS_A_STEP = 16, 2e-4, 8
# a trainer that saves and shows nothing, and computes in the dtype of the parameters
QUIET: Mapping[str, Any] = {
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
    """`steps` are of ROWS_A_STEP rows, 0 for one pass over the rows; `rate` is the first learning
    rate; `seed` draws the adapter and the order of the rows; `full` trains all parameters in place
    of an adapter."""

    seed: int
    steps: int = 0
    rate: float = RATE
    full: bool = False


def random_rows(
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
    """Raises BadOption where TRL would spread a training over several GPUs."""
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        raise BadOption(
            "training takes one GPU, and several are visible; name one in CUDA_VISIBLE_DEVICES"
        )


def refuse_apart(model: CausalLM) -> None:
    """Raises BadOption where an adapter is kept apart: one of another training has no room."""
    if adapter_names(model.network):
        raise BadOption(
            "a training takes a model without an adapter beside its weights, and this one cannot "
            "be merged; save the model merged, with its embeddings untied"
        )


def has_adapter(folder: Path) -> bool:
    return (folder / WEIGHTS).exists()


def with_adapter(loaded: LoadedModel, folder: Path) -> LoadedModel:
    """The model with the adapter of a folder merged into its weights."""
    return replace(loaded, model=load_adapter(loaded.model.network, folder, merge=True))


def warm_up(loaded: LoadedModel, rows: Sequence[Encoded], seed: int) -> tuple[LoadedModel, Path]:
    """The model with a new adapter, trained on `rows`, merged into its weights; and a temporary
    folder with the adapter. Raises BadOption without TRL and PEFT, and without rows."""
    if not rows:
        raise BadOption("--warmup drew no row of this pool; raise its share")
    folder = Path(tempfile.mkdtemp(prefix="prism-warmup-"))
    try:
        adapted = train(loaded.model, loaded.encoder.tokenizer, rows, TrainingSettings(seed))
        adapted.save_pretrained(str(folder))
        lines = list(loaded.warnings)
        model = merged(adapted, random_tokens(adapted), lines.append)
        return replace(loaded, model=model, warnings=lines), folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def train(
    model: CausalLM,
    tokenizer: Any,
    rows: Sequence[Encoded],
    settings: TrainingSettings,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Any:
    """PEFT's model of the network, which is changed in place, after a training on the supervised
    tokens of `rows`; with `settings.full`, the network itself. `on_step` gets the number of the
    step, from 1, and its mean loss in nats per token. Raises BadOption without TRL and PEFT."""
    if len(model.devices) == 1:
        refuse_many_gpus(model.device)
    elif torch.device("cpu") in model.devices:
        raise BadOption(
            "--device-map auto: a training takes GPUs alone, and a part of the model is on the "
            "processor; add GPUs, or take a smaller model"
        )
    refuse_apart(model)
    try:
        from datasets import Dataset, disable_progress_bars
        from huggingface_hub import constants
        from peft import LoraConfig, get_peft_model
        from transformers import PrinterCallback
        from trl.trainer.sft_config import SFTConfig
    except ImportError:
        raise BadOption(_INSTALL) from None

    constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL would report the training to the hub
    disable_progress_bars()
    torch.manual_seed(settings.seed)
    network: Any = model.network
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    learner = network.requires_grad_(True) if settings.full else get_peft_model(network, lora)
    connect(network)
    data = Dataset.from_list([_labelled(row) for row in rows])
    with (
        tempfile.TemporaryDirectory(prefix="prism-training-") as folder,
        warnings.catch_warnings(),
        _staying(model),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # names of settings that are about to change
        arguments = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=ROWS_A_STEP,
            num_train_epochs=1,
            max_steps=settings.steps or -1,
            learning_rate=settings.rate,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            use_cpu=model.device.type == "cpu",
            seed=settings.seed,
            **QUIET,
        )
        trainer = _trainer(model, on_step)(
            model=learner, args=arguments, train_dataset=data, processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return learner


@contextmanager
def _staying(model: CausalLM) -> Iterator[None]:
    """Within it the trainer sees that the model is on several devices, and moves nothing."""
    network: Any = model.network
    if len(model.devices) > 1:
        network.hf_device_map = {str(device): device for device in model.devices}
    try:
        yield
    finally:
        vars(network).pop("hf_device_map", None)


def _labelled(row: Encoded) -> dict[str, list[int]]:
    labels = [token if on else -100 for token, on in zip(row.tokens, row.supervised, strict=True)]
    return {"input_ids": list(row.tokens), "labels": labels}


def _trainer(model: CausalLM, on_step: Callable[[int, float], None]) -> Any:
    """TRL's trainer with the loss of core/likelihood.py."""
    from transformers import TrainerCallback
    from trl.trainer.sft_trainer import SFTTrainer

    class OnStep(TrainerCallback):  # type: ignore[misc]
        loss = math.nan

        def on_step_end(self, _: Any, state: Any, control: Any, **_kwargs: Any) -> None:
            on_step(state.global_step, self.loss)

    class Trainer(SFTTrainer):
        def __init__(self, **kwargs: Any) -> None:
            self.on_step = OnStep()
            super().__init__(**kwargs, callbacks=[self.on_step])

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
            self.on_step.loss = float(loss)
            return loss.to(self.args.device)

    return Trainer
