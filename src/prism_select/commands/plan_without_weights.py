"""Plan without weights: what --dry-run says of a folder that holds a model's config.json alone.

    config.json → shapes → memory, operations        pool → tokens, of its tokenizer or estimated

Choices made here:
- without a tokenizer a token is `CHARACTERS` characters of a row's text;
- a batch is as wide as the longest row of a sample, and as full as --batch-tokens allows; without
  --device cpu it is that of a GPU;
- with --device-map auto, each device of this machine has its weights, and the same share of all
  else;
- an option that the engine `reverse` does not answer for is named, and not counted.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from prism_select.commands.read_inputs import encode_sample
from prism_select.core.layers import Parameters, is_large
from prism_select.data.records import Example
from prism_select.data.remote import local
from prism_select.directions.from_pairs import starting_rank
from prism_select.directions.pair_directions import RANK
from prism_select.directions.saved import of_another_model
from prism_select.models.causal_lm import CausalLM
from prism_select.models.devices import bytes_by_device
from prism_select.models.layer_selection import select_parameters
from prism_select.models.loading import encoder_of, longest_row
from prism_select.models.placement import free_memory, place, scoring_share
from prism_select.models.quantised import quantised_entry
from prism_select.models.without_weights import shapes_of
from prism_select.run.config import BESIDE_PAIRS, ScoreConfig, SelectConfig
from prism_select.run.progress import Progress
from prism_select.run.tensor_files import tensor_shapes
from prism_select.scoring.cost_plan import BYTES_PER_ROW
from prism_select.scoring.model_plan import (
    ModelPlan,
    numbers_of,
    run_bytes,
    scoring_along,
    weight_bytes,
)
from prism_select.scoring.shards import RunInputs

__all__ = ["plan_without_weights"]

CHARACTERS = 4
TOKENIZER, GUESS = "by the tokenizer", f"a token for each {CHARACTERS} characters, no tokenizer"


def plan_without_weights(
    config: ScoreConfig, inputs: RunInputs, processes: int, progress: Progress
) -> ModelPlan:
    """The plan of scoring in so many `processes`. Raises BadModel for a configuration that makes no
    network, and what reading the pool raises."""
    progress.say(f"no weights in {config.model}: planned from its config.json")
    model, tokenizer = shapes_of(config, config.layers)
    weights, targets, halves = _selected(config, inputs, model)
    lengths, rows, counted_by = _lengths(config, inputs, model, tokenizer)
    tokens = round(sum(lengths) / len(lengths) * rows)
    batch_tokens = config.tokens_on("cpu" if config.device == "cpu" else "cuda", model.size)
    shape, is_low = _batch_shape(batch_tokens, max(lengths)), starting_rank(config, weights)
    rank = is_low or RANK
    has_halves = not is_large(weights) or config.needs_halves
    full = scoring_along(model, weights, shape, None, targets + halves * has_halves)
    low = scoring_along(model, weights, shape, rank, targets + halves)
    ways = {"full": full, f"rank {rank}": low}
    size, taken = weight_bytes(model.network), low if is_low else full
    of_run = run_bytes(weights, full, low if is_low else None, len(inputs.targets), rank)
    in_dtype = is_low or is_large(weights)
    saved_bytes = taken.direction_bytes if in_dtype else 4 * taken.numbers
    return ModelPlan(
        tokens=tokens,
        seconds=tokens * taken.seconds_per_million / 1e6 / processes,
        memory_bytes=size + of_run,
        disk_bytes=saved_bytes + rows * BYTES_PER_ROW,
        parameters=sum(parameter.numel() for parameter in model.network.parameters()),
        selected=numbers_of(weights),
        dtype=_dtype(model),
        weights_bytes=size,
        batch_tokens=batch_tokens,
        batch_bytes=taken.batch_bytes,
        scoring_bytes={name: size + scoring.bytes for name, scoring in ways.items()},
        seconds_per_million={name: scoring.seconds_per_million for name, scoring in ways.items()},
        counted_by=counted_by,
        not_counted=_not_counted(config),
        by_device=_by_device(config, model, (size + of_run) / size),
    )


def _by_device(config: ScoreConfig, model: CausalLM, beside: float) -> dict[str, int]:
    """Bytes with --device-map auto, which are `beside` times those of the weights; empty where they
    are all on one device."""
    if config.device_map == "none":
        return {}
    network, sizes = model.network, Counter[str]()
    share, packed = scoring_share(network, config, config.layers), quantised_entry(network)
    for name, device in place(network, free_memory(packed is None), share).items():
        part = network.get_submodule(name)
        sizes[str(device)] += round(beside * sum(bytes_by_device(part).values()))
    return dict(sizes) if len(sizes) > 1 else {}


def _dtype(model: CausalLM) -> str:
    """In words, with that of matrices in few bits."""
    dtype, packed = str(model.dtype).removeprefix("torch."), quantised_entry(model.network)
    return f"{dtype}, matrices in {packed['bits']} bits" if packed else dtype


def _batch_shape(tokens: int, longest: int) -> tuple[int, int]:
    """Rows, and tokens of each."""
    rows = max(1, tokens // longest)
    return rows, max(longest, tokens // rows)


def _selected(
    config: ScoreConfig, inputs: RunInputs, model: CausalLM
) -> tuple[Parameters, int, int]:
    """The selected parameters, and the number of directions, of targets and of chosen halves; of a
    saved direction, those of its file together."""
    if not config.direction:
        targets = len(inputs.targets)
        halves = targets if config.combine == "max" else 1
        return select_parameters(model.network, config.layers), targets, halves
    shapes = tensor_shapes(local(config.direction))
    parameters = dict(model.network.named_parameters())
    names = {key.rpartition("/")[2] for key in shapes}
    for key, shape in shapes.items():
        name = key.rpartition("/")[2]
        if name not in parameters or parameters[name].shape != shape:
            raise of_another_model(config.direction, name)
    labels = {key.rpartition("/")[0] for key in shapes}
    return {name: p for name, p in parameters.items() if name in names}, len(labels), 0


def _lengths(
    config: ScoreConfig, inputs: RunInputs, model: CausalLM, tokenizer: object | None
) -> tuple[Sequence[int], int, str]:
    """Tokens of each row of a sample, the good rows of the pool, and how tokens were counted."""
    if tokenizer:
        encoder = encoder_of(config, model, tokenizer, bounded=not config.adapter)
        sample = encode_sample(config, inputs, encoder)
        return [len(row.tokens) for row in sample.rows], sample.pool_rows, TOKENIZER
    longest = min(config.max_length, longest_row(model.network.config) or config.max_length)
    texts = map(_characters, inputs.survey.sample)
    lengths = [min(longest, max(2, round(text / CHARACTERS))) for text in texts]
    return lengths, inputs.survey.rows - inputs.survey.bad, GUESS


def _characters(example: Example) -> int:
    return sum(len(turn.text) for turn in example.turns)


def _not_counted(config: ScoreConfig) -> list[str]:
    options: Mapping[str, object] = {
        f"--engine {config.engine}": config.engine not in ("auto", "reverse"),
        "--tokens": config.tokens,
        "--normalize norm": config.normalize == "norm",
        f"--curvature {config.curvature}": config.curvature in BESIDE_PAIRS,
        "--tune": config.tuned,
        "--warmup": config.warmup,
        "--cascade": config.cascade,
        "groups of pairs": isinstance(config, SelectConfig) and config.has_groups,
    }
    return [option for option, is_used in options.items() if is_used]
