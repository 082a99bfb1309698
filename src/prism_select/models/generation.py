"""Generation: answers that the model itself gives, and which of several it likes best.

    prompt → answers ~ p(answer | prompt)      favourite = argmax of the mean log-likelihood

Choices made here:
- plain sampling at temperature 1: nothing is cut from the distribution and nothing penalised;
- an answer ends at the model's own end token or at --stop; one that does not end within
  --new-tokens is no answer.
"""

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
    """The tokens before the last answer. Raises NoPair where `new_tokens` more do not fit, BadRow
    where the row cannot be encoded."""
    row = encoder.encode(replace(example, prompt_turns=len(example.turns) - 1))
    prompt = row.tokens[: row.supervised.index(True)]
    if not prompt or len(prompt) + new_tokens > encoder.max_length:
        raise NoPair(
            f"its prompt of {len(prompt)} tokens leaves no room for --new-tokens {new_tokens} "
            "within --max-length"
        )
    return prompt


def sample(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], config: PairsConfig
) -> list[list[str]]:
    """For each prompt, those of `config.samples` answers that end."""
    rows = [Encoded(prompt, [False] * len(prompt), False) for prompt in prompts]
    batch = collate(rows, loaded.model.device, side="left")
    network: Any = loaded.model.network
    tokenizer, end = loaded.encoder.tokenizer, network.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])} - {None}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(config.seed + sum(map(len, prompts)))
        output = network.generate(
            input_ids=batch.tokens,
            attention_mask=batch.real.long(),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=config.new_tokens,
            num_return_sequences=config.samples,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
        )
    tokens = output[:, batch.tokens.shape[1] :]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    ended = [bool(ends & set(row)) for row in tokens.tolist()]
    answers = [
        _finished(text, config.stop, has_end) for text, has_end in zip(texts, ended, strict=True)
    ]
    return [
        [answer for answer in answers[start : start + config.samples] if answer]
        for start in range(0, len(answers), config.samples)
    ]


def _finished(text: str, stop: str | None, ended: bool) -> str | None:
    """The answer before `stop`; None where it does not end."""
    before, stopped, _ = text.partition(stop) if stop else (text, "", "")
    return before if stopped or ended else None


def favourite(loaded: LoadedModel, answers: Sequence[Example]) -> int:
    """The index of the answer with the highest mean log-likelihood."""
    rows = [loaded.encoder.encode(answer) for answer in answers]
    return int(mean_logliks(loaded.model, collate(rows, loaded.model.device)).argmax())
