"""Generation: what the model itself would say, and which of several answers it likes best.

Choices made here: plain sampling at a temperature, nothing cut from the distribution and nothing
penalised; prompts padded on the left; an answer ends at the model's own end token or at --stop, and
one that does not end within --new-tokens is no answer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from prism_select.core.likelihood import mean_logliks
from prism_select.data.batches import collate
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.pairing import NoPair
from prism_select.data.records import Example
from prism_select.models.loading import LoadedModel
from prism_select.run.config_pairs import PairsConfig

__all__ = ["favourite", "prompt_of", "sample"]


def prompt_of(encoder: Encoder, example: Example, new_tokens: int) -> Sequence[int]:
    """The tokens before the last answer. Raises NoPair where an answer of `new_tokens` has no room
    after them, BadRow where the row cannot be encoded."""
    row = encoder.encode(replace(example, prompt_turns=len(example.turns) - 1))
    prompt = row.tokens[: row.supervised.index(True)]
    if not prompt or len(prompt) + new_tokens > encoder.max_length:
        raise NoPair(
            f"its prompt of {len(prompt)} tokens leaves no room for --new-tokens {new_tokens} within --max-length"
        )
    return prompt


def sample(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], config: PairsConfig
) -> list[list[str]]:
    """Those of `config.samples` answers to each prompt that end."""
    model, encoder = loaded.model, loaded.encoder
    batch = collate(
        [Encoded(prompt, [False] * len(prompt), False) for prompt in prompts], model.device, "left"
    )
    network: Any = model.network
    ends = network.generation_config.eos_token_id
    known = {encoder.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(config.seed + sum(map(len, prompts)))
        spoken = network.generate(
            input_ids=batch.tokens,
            attention_mask=batch.real.long(),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=config.new_tokens,
            num_return_sequences=config.samples,
            eos_token_id=sorted(known) or None,
            pad_token_id=min(known, default=0),
        )
    answers = spoken[:, batch.tokens.shape[1] :]
    texts = encoder.tokenizer.batch_decode(answers, skip_special_tokens=True)
    ended = [bool(known & set(row)) for row in answers.tolist()]
    said = [_finished(text, config.stop, end) for text, end in zip(texts, ended, strict=True)]
    return [
        [text for text in said[i : i + config.samples] if text]
        for i in range(0, len(said), config.samples)
    ]


def _finished(text: str, stop: str | None, ended: bool) -> str | None:
    before, found, _ = text.partition(stop) if stop else (text, "", "")
    return before if found or ended else None


def favourite(loaded: LoadedModel, answers: Sequence[Example]) -> int:
    """The place of the answer with the highest mean log-likelihood."""
    rows = [loaded.encoder.encode(answer) for answer in answers]
    return int(mean_logliks(loaded.model, collate(rows, loaded.model.device)).argmax())
