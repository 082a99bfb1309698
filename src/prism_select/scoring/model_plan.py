"""Model plan: what a run needs of a model whose weights are not here, from shapes alone.

    weights      numbers · bytes of the dtype; a matrix in 8 bits: 1 byte each + 4 for each row,
                 in 4 bits: 1/2 byte each + 4 for each 64
    scoring      weights + directions, each number in the dtype + a batch: its graph and the rest
    run          in full: scoring + C and C − R of the pairs, each number of the selected in
                 float32; above `IN_FULL` numbers: weights + C − R in the dtype + a batch; of low
                 rank: weights + directions + a batch + what the range finder holds
    operations   of matrix products: forward, backward, and what the directions add

Choices made here:
- a batch is that of a dry run of the engine `reverse` (core/dry_run.py), not of a formula;
- blocks alike are run once, and again with one more of a kind: each further one adds as much;
- matrices of few bits are those of the blocks, without an adapter's;
- seconds are operations at 10¹⁴ a second: a round number to scale, and no promise.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from prism_select.core import layers
from prism_select.core.blocks import decoder_of, stack_of
from prism_select.core.dry_run import DryRun
from prism_select.core.engines import reverse
from prism_select.core.layers import Factored, Factors, Parameters, is_large, owners
from prism_select.core.likelihood import Batch
from prism_select.directions.answer_products import by_kind
from prism_select.directions.pair_directions import RANK
from prism_select.directions.range_finder import MORE
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import adapter_names
from prism_select.models.quantised import packed_bytes, packed_matrices
from prism_select.run.errors import BadModel
from prism_select.scoring.cost_plan import Plan

__all__ = [
    "ModelPlan",
    "Scoring",
    "numbers_of",
    "run_bytes",
    "scoring_along",
    "weight_bytes",
]

PER_SECOND = 1e14  # operations: 100 TFLOP/s
FORMED = 2**26  # larger slices than on a processor: fewer steps of a trial


@dataclass(frozen=True)
class ModelPlan(Plan):
    """Of a run on a device that is not here: `seconds` of scoring the pool, `memory_bytes` of the
    whole run. By the rank of the directions ("full": every number): `scoring_bytes` of a process
    that only scores, and `seconds_per_million` tokens. `not_counted` are options that add to it."""

    parameters: int
    selected: int
    dtype: str
    weights_bytes: int
    batch_tokens: int
    batch_bytes: int
    scoring_bytes: Mapping[str, int]
    seconds_per_million: Mapping[str, float]
    counted_by: str
    not_counted: Sequence[str]


@dataclass(frozen=True)
class Scoring:
    """Beside the weights: `numbers` of all directions, their bytes in the dtype and as they arrive,
    before there is a batch; those of one batch at the highest, and operations for each of its
    tokens."""

    numbers: int
    direction_bytes: int
    arriving_bytes: int
    batch_bytes: int
    operations: float

    @property
    def bytes(self) -> int:
        return self.direction_bytes + max(self.batch_bytes, self.arriving_bytes)

    @property
    def seconds_per_million(self) -> float:
        return self.operations * 1e6 / PER_SECOND


def numbers_of(weights: Parameters) -> int:
    return sum(weight.numel() for weight in weights.values())


def weight_bytes(network: nn.Module, bits: int = 16) -> int:
    """Of all parameters, a shared one once; packed matrices in their own bits. With `bits` 8 or 4:
    if matrices of Linear had those."""
    stack, _ = stack_of(network)
    narrow = {
        f"{path}.weight": packed_bytes(module.out_features, module.in_features, bits)
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear) and path.startswith(f"{stack}.") and bits < 16
    }
    own = {name: packed.bytes for name, packed in packed_matrices(network).items()}
    narrow = {n: size for n, size in narrow.items() if n not in adapter_names(network)} | own
    return sum(
        narrow.get(name, parameter.numel() * parameter.element_size())
        for name, parameter in network.named_parameters()
    )


def scoring_along(
    model: CausalLM, weights: Parameters, shape: tuple[int, int], rank: int | None, count: int = 2
) -> Scoring:
    """Along `count` directions of a rank, of a batch of `shape` (rows, tokens). Raises BadModel
    where the network cannot be run without its numbers."""
    directions = [_direction(model.network, weights, rank)] * count
    numbers = count * _numbers(directions[0])
    own = numbers * next(iter(weights.values())).element_size()
    arriving = 0 if rank is None and is_large(weights) else 4 * numbers  # in float32, and a copy
    peak, operations = _Trial(model, weights, directions, shape).of_all_blocks()
    return Scoring(numbers, own, arriving, peak - own, operations / (shape[0] * shape[1]))


def run_bytes(
    weights: Parameters,
    full: Scoring,
    low: Scoring | None = None,
    targets: int = 1,
    rank: int = RANK,
) -> int:
    """What a run holds beside the weights. `low` is along directions that are of that rank from the
    start (directions/range_finder.py); without `targets` the direction is a saved one, with its
    half."""
    if low:
        sketches = 4 * low.numbers * (rank + MORE) / rank
        return round(low.direction_bytes + low.batch_bytes + sketches)
    if is_large(weights):
        return full.direction_bytes + full.batch_bytes
    held = 4 * numbers_of(weights) * (2 * targets + (targets > 1) or 2)
    return held + full.direction_bytes + full.batch_bytes


def _direction(network: nn.Module, weights: Parameters, rank: int | None) -> Factored:
    """As range_finder.py shapes it, in a dtype of which the engine makes its own copy."""
    matrices, _ = by_kind(owners(network, weights))

    def of(name: str, weight: Tensor) -> Tensor | Factors:
        if rank is None or name not in matrices or min(weight.shape) <= rank:
            return torch.empty(weight.shape, dtype=torch.float64, device="meta")
        rows, columns = weight.shape
        return Factors(
            torch.empty(rows, rank, dtype=torch.float64, device="meta"),
            torch.empty(rank, columns, dtype=torch.float64, device="meta"),
        )

    return {name: of(name, weight) for name, weight in weights.items()}


def _numbers(direction: Factored) -> int:
    return sum(
        sum(factor.numel() for factor in value) if isinstance(value, Factors) else value.numel()
        for value in direction.values()
    )


@dataclass(frozen=True)
class _Trial:
    """An engine and a batch without numbers. Its figures are bytes at the highest, beside the
    weights, and operations."""

    model: CausalLM
    weights: Parameters
    directions: Sequence[Factored]
    shape: tuple[int, int]

    def of_all_blocks(self) -> tuple[int, int]:
        _, blocks = stack_of(self.model.network)
        selected = {id(weight) for weight in self.weights.values()}
        kinds = [_kind(block, selected) for block in blocks]
        firsts = sorted({kind: kinds.index(kind) for kind in kinds}.values())
        base = self.of_blocks(firsts)
        peak, operations = base
        for first in firsts:
            number = kinds.count(kinds[first])
            if number > 1:
                second = kinds.index(kinds[first], first + 1)
                more = self.of_blocks(sorted([*firsts, second]))
                peak += (number - 1) * (more[0] - base[0])
                operations += (number - 1) * (more[1] - base[1])
        return peak, operations

    def of_blocks(self, numbers: Sequence[int]) -> tuple[int, int]:
        """With the blocks of these numbers alone."""
        network = self.model.network
        with _only_blocks(network, numbers), self.counted() as seen:
            here = {id(parameter) for parameter in network.parameters()}
            some = {name: weight for name, weight in self.weights.items() if id(weight) in here}
            parts = [{name: direction[name] for name in some} for direction in self.directions]
            engine = reverse(self.model, some, parts)
            seen.peak = seen.operations = 0  # it has its own directions now
            mask = torch.ones(self.shape, dtype=torch.bool)
            engine(Batch(torch.zeros(self.shape, dtype=torch.long), mask, mask))
        return seen.peak, seen.operations

    @contextmanager
    def counted(self) -> Iterator[DryRun]:
        """Of all but parameters and directions. Raises BadModel for whatever the network does that
        needs numbers, and for parameters that the engine cannot reach."""
        network, values = self.model.network, [v for d in self.directions for v in d.values()]
        given = [t for v in values for t in (v if isinstance(v, Factors) else (v,))]
        larger = mock.patch.object(layers, "FORMED", FORMED)
        try:
            with torch.device("meta"), larger, DryRun([*network.parameters(), *given]) as seen:
                yield seen
        except Exception as error:  # of any kind: a network may ask for any number
            why = " ".join(str(error).partition("; try")[0].split())[:200] or type(error).__name__
            raise BadModel(
                f"{type(network).__name__}: it cannot be planned without its weights ({why}); plan "
                "it where they are"
            ) from error


@contextmanager
def _only_blocks(network: nn.Module, numbers: Sequence[int]) -> Iterator[None]:
    """Within it the network has these of its blocks."""
    (_, blocks), (_, decoder) = stack_of(network), decoder_of(network)
    some = {str(place): blocks[number] for place, number in enumerate(numbers)}
    kinds = vars(decoder.config).get("layer_types")  # which mask a block gets
    with ExitStack() as patches:
        if some:
            patches.enter_context(mock.patch.object(blocks, "_modules", some))
        if kinds:
            own = [kinds[number] for number in numbers]
            patches.enter_context(mock.patch.object(decoder.config, "layer_types", own))
        yield


def _kind(block: nn.Module, selected: set[int]) -> Any:
    """The same for blocks that take the same memory and operations."""
    parameters = [(n, p.shape, p.dtype, id(p) in selected) for n, p in block.named_parameters()]
    return type(block), tuple(parameters)
