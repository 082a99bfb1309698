"""Generation: what the model itself would say, and which of several answers it likes best.

Choices made here: plain sampling at a temperature, nothing cut from the distribution; prompts padded on the left; an
answer ends at the model's own end token, at --stop, or after --new-tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch

from prism_select.config import PairsConfig
from prism_select.core.likelihood import token_logliks
from prism_select.data.batches import Encoded, Encoder, collate
from prism_select.data.records import Example
from prism_select.models import CausalLM

__all__ = ["favourite", "sample"]


def sample(model: CausalLM, encoder: Encoder, examples: Sequence[Example], config: PairsConfig) -> list[list[str]]:
    """`config.samples` answers to the prompt of each example."""
    rows = [encoder.encode(example) for example in examples]
    prompts = [row.tokens[: row.supervised.index(True)] for row in rows]
    batch = collate([Encoded(prompt, [False] * len(prompt), False) for prompt in prompts], model.device, "left")
    network: Any = model.network
    end = encoder.tokenizer.eos_token_id
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(config.seed + examples[0].line)
        spoken = network.generate(
            input_ids=batch.tokens,
            attention_mask=batch.real.long(),
            do_sample=True,
            temperature=config.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=config.new_tokens,
            num_return_sequences=config.samples,
            pad_token_id=0 if end is None else end,
        )
    texts = encoder.tokenizer.batch_decode(spoken[:, batch.tokens.shape[1] :], skip_special_tokens=True)
    said = [text.partition(config.stop)[0] if config.stop else text for text in texts]
    return [said[i : i + config.samples] for i in range(0, len(said), config.samples)]


def favourite(model: CausalLM, encoder: Encoder, answers: Sequence[Example]) -> int:
    """The place of the answer with the highest mean log-likelihood."""
    batch = collate([encoder.encode(answer) for answer in answers], model.device)
    with torch.no_grad():
        return int((token_logliks(model, batch).double().sum(1) / batch.counts).argmax())
