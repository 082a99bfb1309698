"""A transformer of our own in plain torch, exact in float64 from end to end, as a fake of the
core's LanguageModel.

Hugging Face models keep norms, rotary angles and softmax in float32 even after `.double()`; this
one does not, so engines that are right agree on it to rounding."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from prism_select.core.likelihood import Batch
from prism_select.core.target_gradient import Side

VOCABULARY, WIDTH, BLOCKS, LONGEST = 61, 16, 4, 32


class Scale(nn.Module):
    """RMS norm with a learned gain: a module without a formula in the reverse engine."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = Scale(), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.qkv(self.before(x)).chunk(3, -1)
        weights = (query @ key.transpose(1, 2) / WIDTH**0.5).masked_fill(~mask, -1e9).softmax(-1)
        x = x + self.out(weights @ value)
        moved: Tensor = x + self.down(functional.gelu(self.up(self.between(x))))
        return moved


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.blocks, self.last = nn.ModuleList(Block() for _ in range(BLOCKS)), nn.LayerNorm(WIDTH)

    def forward(self, batch: Batch) -> Tensor:
        time = batch.tokens.shape[1]
        mask = torch.ones(time, time, dtype=torch.bool).tril() & batch.real[:, None, :]
        x = self.words(batch.tokens) + self.positions(batch.positions)
        for block in self.blocks:
            x = block(x, mask)
        hidden: Tensor = self.last(x)
        return hidden


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(WIDTH, VOCABULARY)


class Tiny:
    """`tied` shares the embedding with the head."""

    def __init__(self, seed: int = 0, tied: bool = True) -> None:
        torch.manual_seed(seed)
        self.network = Network().double()
        if tied:
            self.network.head.weight = self.network.body.words.weight
        with torch.no_grad():
            for weight in self.network.parameters():
                weight.add_(0.2 * torch.randn_like(weight)).requires_grad_(False)
        self.vocabulary = VOCABULARY

    def hidden(self, batch: Batch) -> Tensor:
        hidden: Tensor = self.network.body(batch)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.network.head(hidden)
        return logits


def batch_of(
    rows: int, time: int = 14, seed: int = 0, left: bool = False, vocabulary: int = VOCABULARY
) -> Batch:
    """Random rows of random lengths, about half of their tokens supervised and never none."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, vocabulary, (rows, time), generator=draw)
    lengths = torch.randint(time // 2, time + 1, (rows, 1), generator=draw)
    supervised = torch.rand(rows, time, generator=draw) < 0.5
    supervised[:, 3] = True
    positions = torch.arange(time)
    real = positions < lengths
    tokens, supervised = tokens * real, supervised & real
    if left:
        order = (positions[None] + lengths) % time
        tokens, real = tokens.gather(1, order), real.gather(1, order)
        supervised = supervised.gather(1, order)
    return Batch(tokens, real, supervised)


def pairs_of(count: int, seed: int = 0, vocabulary: int = VOCABULARY) -> tuple[Side, Side]:
    """Random pairs in two batches, their sides of different lengths."""
    order = list(range(count))
    even, odd = order[::2], order[1::2]

    def side(time: int, first: int) -> Side:
        batches = [
            batch_of(len(pairs), time, seed * 100 + 10 * half + first, vocabulary=vocabulary)
            for half, pairs in enumerate((even, odd))
        ]
        return Side(batches, [*even, *odd])

    return side(10, 0), side(12, 1)
