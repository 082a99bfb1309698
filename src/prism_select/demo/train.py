"""The demo model: a tiny Llama that reads about the demo world, for some minutes on one core.

    corpus → byte-level BPE of 1,280 tokens → one pass of AdamW over the assistant turns
           → demo/model/
    rows   → the bundled model, `PASSES` passes of the same training → a fine-tuned model

`python -m prism_select.demo.train [--out DIR]` makes the bundled folder again. On the same machine
and versions it gives the same bytes: seeds, order and the number of threads (one) are fixed.

Choices made here:
- one pass, so that the model learns how reliable each fact is, and no row by heart;
- the loss counts the answer and its end-of-turn token, as PRISM does;
- nearly every word is one token;
- embeddings are untied, so that the output head is a parameter of its own;
- the chat template writes the first token and the tokenizer adds none, so it is never doubled.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from prism_select.demo import world
from prism_select.run.progress import Progress

__all__ = ["MODEL_DIR", "encode", "fine_tune", "make_model", "make_tokenizer", "train"]

MODEL_DIR = Path(__file__).parent / "model"
SEED = 0
ROWS, BATCH, LEARNING_RATE = 64_000, 64, 3e-3
PASSES = 2  # of a fine-tuning
IGNORED = -100  # the label of a token that is not supervised
START, TURN, END, PAD = "<|start|>", "<|turn|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|turn|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
{%- else %}{{- message['content'] + eos_token }}{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn|>assistant\\n' }}{%- endif %}
"""

Row = Mapping[str, Any]
Encoded = tuple[list[int], list[int]]


def make_tokenizer(rows: Sequence[Row]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, learned on the corpus; digits stay single tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    special, alphabet = [START, TURN, END, PAD], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1280, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    texts = [text for row in rows for text in row.values()]
    bpe.train_from_iterator(texts + ["system", "user", "assistant"] * len(rows), trainer)
    roles = {"bos_token": START, "eos_token": END, "pad_token": PAD, "extra_special_tokens": [TURN]}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, model_max_length=256, clean_up_tokenization_spaces=False, **roles
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """1.1 million parameters in four blocks; two query heads share each key head."""
    size = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "max_position_embeddings": 256,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    tokens = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    config = LlamaConfig(vocab_size=len(tokenizer), **size, **heads, **tokens)
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, row: Row) -> Encoded:
    """Token ids of a conversation, and its labels: `IGNORED` outside the assistant's turn."""
    messages = [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]
    coded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = list(coded["input_ids"])
    supervised = coded["assistant_masks"]
    labels = [token if counts else IGNORED for token, counts in zip(ids, supervised, strict=True)]
    return ids, labels


def batch_loss(model: LlamaForCausalLM, batch: list[Encoded], pad: int) -> torch.Tensor:
    """Mean cross-entropy over the supervised tokens of a batch; rows are padded on the right."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in batch])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in batch])
    logits = model(input_ids=ids).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def train(
    model: LlamaForCausalLM,
    rows: list[Encoded],
    pad: int,
    on_step: Callable[[int, int, float], object],
) -> None:
    """One pass in the order of the rows; the learning rate rises for 5% of the steps, then falls to
    zero. `on_step` gets the number of the step, from 1, of how many, and its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    steps = len(rows) // BATCH
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, (steps - s) / (steps - warm))
    )
    for step in range(steps):
        loss = batch_loss(model, rows[step * BATCH : (step + 1) * BATCH], pad)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(step + 1, steps, loss.item())


def fine_tune(rows: Sequence[Row], out: Path, progress: Progress) -> None:
    """Writes to `out` what the bundled model becomes by training on `rows`."""
    disable_progress_bar()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL_DIR)
    model = LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).train()
    coded = [encode(tokenizer, row) for row in rows] * PASSES
    with progress.task("fine-tuning", len(coded) // BATCH) as task:
        train(model, coded, model.config.pad_token_id, lambda *_: task.advance(1))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def print_step(step: int, steps: int, loss: float) -> None:
    if step % 100 == 1 or step == steps:
        print(f"step {step} of {steps}: loss {loss:.3f}", flush=True)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description="Train the bundled demo model again.")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder to write")
    out: Path = parser.parse_args().out
    disable_progress_bar()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    rows = world.corpus(ROWS, SEED)
    tokenizer = make_tokenizer(rows)
    model = make_model(tokenizer)
    coded = [encode(tokenizer, row) for row in rows]
    train(model, coded, model.config.pad_token_id, print_step)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
