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
from jaxtyping import Int
from torch import Tensor

from prism_select.core.likelihood import mean_logliks
from prism_select.data.batches import collate
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.pairing import NoPair
from prism_select.data.records import Example
from prism_select.models.devices import seeded
from prism_select.models.loading import LoadedModel
from prism_select.run.config_pairs import PairsConfig

__all__ = ["draw_tokens", "end_tokens", "favourite", "prompt_of", "sample"]


DRAWN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


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
    """For each prompt, those of its answers that end: `config.samples` drawn ones, or the greedy
    one without a number."""
    network, count = loaded.model.network, config.samples or 1
    tokenizer = loaded.encoder.tokenizer
    ends = end_tokens(network, tokenizer)
    with seeded(network, config.seed + sum(map(len, prompts))):
        tokens = draw_tokens(
            network, prompts, ends, config.new_tokens, count, greedy=config.samples is None
        )
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    ended = [not set(ends).isdisjoint(row) for row in tokens.tolist()]
    answers = [
        _finished(text, config.stop, has_end) for text, has_end in zip(texts, ended, strict=True)
    ]
    return [
        [answer for answer in answers[start : start + count] if answer]
        for start in range(0, len(answers), count)
    ]


def end_tokens(network: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer, by the network or the tokenizer."""
    end = getattr(network.generation_config, "eos_token_id", None)
    return sorted({tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])} - {None})


@torch.no_grad()
def draw_tokens(
    network: Any,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    new_tokens: int,
    samples: int = 1,
    greedy: bool = False,
) -> Int[Tensor, "answers new_tokens"]:
    """What follows each prompt, `samples` times, drawn with torch's own random numbers unless
    `greedy`. Padding follows one of the tokens `ends`."""
    rows = [Encoded(prompt, [False] * len(prompt), False) for prompt in prompts]
    batch = collate(rows, next(network.parameters()).device, side="left")
    output: Tensor = network.generate(
        input_ids=batch.tokens,
        attention_mask=batch.real.long(),
        **({"do_sample": False} if greedy else DRAWN),
        repetition_penalty=1.0,
        max_new_tokens=new_tokens,
        num_return_sequences=samples,
        eos_token_id=[*ends] or None,
        pad_token_id=min(ends, default=0),
    )
    return output[:, batch.tokens.shape[1] :]


def _finished(text: str, stop: str | None, ended: bool) -> str | None:
    """The answer before `stop`; None where it does not end."""
    before, stopped, _ = text.partition(stop) if stop else (text, "", "")
    return before if stopped or ended else None


def favourite(loaded: LoadedModel, answers: Sequence[Example]) -> int:
    """The index of the answer with the highest mean log-likelihood."""
    rows = [loaded.encoder.encode(answer) for answer in answers]
    return int(mean_logliks(loaded.model, collate(rows, loaded.model.device)).argmax())
