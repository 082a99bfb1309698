"""Hidden states: the mean output of each block over an answer, and answers of the model's own.

    answer_states(rows)[layer, row] = mean over the row's supervised tokens of the block's output

Choices made here:
- one pass reads all layers, and only means stay in memory: layers · rows · width numbers;
- means are taken in float32 or better;
- a token without a context, the first of a row, is in no mean, as it is in no loss;
- a network without a stack of blocks has one layer, its decoder's output;
- the model's own answer is sampled at temperature 1 and is at most as long as the row's answers; in
  a row of several answers it takes the place of the first.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prism_select.core.blocks import decoder_of, stack_of
from prism_select.core.likelihood import Batch, LanguageModel
from prism_select.data.batches import plan_batches
from prism_select.data.encoding import Encoded
from prism_select.models.devices import seeded
from prism_select.models.generation import draw_tokens

__all__ = ["answer_states", "layers_of", "own_answers"]


def layers_of(network: nn.Module) -> Sequence[nn.Module]:
    return stack_of(network)[1] or [decoder_of(network)[1]]


def answer_states(
    model: LanguageModel, batch: Batch, layers: Sequence[nn.Module]
) -> list[Float[Tensor, "batch width"]]:
    """Of each of these layers, with a graph where the model's parameters ask for one."""
    counted = nn.functional.pad(batch.predicted, (1, 0))
    share = counted / counted.sum(1, keepdim=True)
    means: dict[nn.Module, Tensor] = {}

    def store(layer: nn.Module, inputs: Any, output: Any) -> None:
        states = output if isinstance(output, Tensor) else output[0]
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        means[layer] = torch.einsum("bt,btw->bw", share.to(wide), wide)

    with _hooked(layers, store):
        model.hidden(batch)
    return [means[layer] for layer in layers]


@contextmanager
def _hooked(layers: Sequence[nn.Module], show: Any) -> Iterator[None]:
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(show).remove)
        yield


def own_answers(
    model: LanguageModel,
    rows: Sequence[Encoded],
    ends: Sequence[int],
    batch_tokens: int,
    seed: int,
) -> list[Encoded]:
    """The prompt of each row with an answer that the model draws, up to one of the tokens `ends`
    or to the length of the row's answers."""
    own = dict[int, Encoded]()
    prompts = [row.tokens[: max(1, row.supervised.index(True))] for row in rows]
    lengths = [len(prompt) + row.targets for prompt, row in zip(prompts, rows, strict=True)]
    with seeded(model.network, seed):
        for indices in plan_batches(lengths, batch_tokens):
            longest = max(rows[i].targets for i in indices)
            drawn = draw_tokens(model.network, [prompts[i] for i in indices], ends, longest)
            for i, tokens in zip(indices, drawn.tolist(), strict=True):
                answer = _until(tokens[: rows[i].targets], ends)
                supervised = [False] * len(prompts[i]) + [True] * len(answer)
                own[i] = Encoded([*prompts[i], *answer], supervised, False)
    return [own[i] for i in range(len(rows))]


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """With the first of the `ends`, as in a row."""
    found = [place for place, token in enumerate(tokens) if token in ends]
    return tokens[: found[0] + 1] if found else tokens
