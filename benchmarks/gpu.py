"""How fast are engines on a GPU, and does the plan say how much memory they take?

    make gpu                              at most eight minutes on one card
    python benchmarks/gpu.py --small      the same in seconds on a CPU, with tiny models

Llamas of random weights, of 1 and 8 billion numbers in bfloat16, are made on the card:

    engines      reverse along a full direction and one of rank 64, forward; difference in float32
    batches      tokens per second for several --batch-tokens
    few bits     the same bases packed by bitsandbytes
    two GPUs     the layers spread as by --device-map auto: the scores of one GPU?
    a run        prism score on a few rows, with all that comes beside scoring

Choices made here:
- what runs out of memory, or is not there, is a line that says so, and no figure;
- a time is the median of what `SECONDS` have room for, three batches at most, after one to warm up;
- peak memory is torch's own count on a GPU, with the weights, against that of model_plan.py; on a
  CPU it is the tensors that torch's operators make;
- after `LAST` seconds nothing new begins."""

import argparse
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from results_file import figure, write
from torch import Tensor, nn

from prism_select.core.dry_run import DryRun
from prism_select.core.engines import ENGINES
from prism_select.core.layers import Factored, Factors, Parameters
from prism_select.core.likelihood import Batch, mean_logliks
from prism_select.directions.low_rank import beside
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import select_parameters
from prism_select.models.loading import adopt
from prism_select.models.placement import free_memory, network_of, place, scoring_share
from prism_select.run.config import ModelOptions
from prism_select.run.errors import PrismError, out_of_memory
from prism_select.run.objects import ModelObject
from prism_select.scoring.model_plan import scoring_along, weight_bytes

Row = dict[str, Any]
WORK = Path(__file__).parent / "work" / "gpu"
SECONDS, LAST = 6.0, 420.0
RANK = 64


@dataclasses.dataclass(frozen=True)
class Size:
    """Models by name, tokens in a batch, tokens of a row, and rows of a run."""

    models: Mapping[str, Row]
    batch_tokens: Sequence[int]
    width: int
    rows: int
    rank: int


def shape(width: int, inner: int, layers: int, heads: int, **more: Any) -> Row:
    few = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    attention = {"num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128_256}
    return {**few, **attention, "dtype": "bfloat16", **more}


CARD = Size(
    {
        "1B": shape(2048, 8192, 16, 32, tie_word_embeddings=True),
        "8B": shape(4096, 14_336, 32, 32),
    },
    (1024, 4096, 16_384),
    512,
    200,
    RANK,
)
TINY = {"vocab_size": 2048, "num_key_value_heads": 2}
SMALL = Size(
    {
        "1B": shape(64, 96, 2, 4, tie_word_embeddings=True, **TINY),
        "8B": shape(96, 128, 3, 4, **TINY),
    },
    (64, 128),
    16,
    12,
    4,
)


class Bench:
    """Rows and figures of one machine; `device` is where models are made."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        self.rows, self.figures = list[Row](), list[Row]()
        self.started = time.perf_counter()
        is_gpu = device.type == "cuda"
        self.rows.append(
            {
                "part": "device",
                "name": torch.cuda.get_device_name(device) if is_gpu else "cpu",
                "gpus": torch.cuda.device_count() if is_gpu else 0,
                "bytes": torch.cuda.mem_get_info(device)[1] if is_gpu else 0,
            }
        )

    def run(self) -> None:
        for name in self.size.models:
            self.part(f"{name}, bfloat16", partial(self.in_16_bits, name))
            for bits in (8, 4):
                self.part(f"{name}, {bits} bits", partial(self.few_bits, name, bits))
            self.part(f"{name}, two GPUs", partial(self.two_gpus, name))
        first = next(iter(self.size.models))
        self.part(f"{first}, float32", partial(self.in_float32, first))
        self.part(f"{first}, a run", partial(self.whole_run, first))

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Memory that runs out, time that does, and what a library lacks end a part alone."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            if time.perf_counter() - self.started > LAST:
                raise TimeoutError(f"not begun: {LAST:.0f} s are over")
            work()
        except (RuntimeError, MemoryError, TimeoutError, ImportError, PrismError) as error:
            self.fail(name, error)

    def fail(self, name: str, error: BaseException) -> None:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        is_memory = out_of_memory(error)
        self.say(name, f"out of memory ({why})" if is_memory else why, out_of_memory=is_memory)

    def say(self, part: str, missing: str, **more: Any) -> None:
        print(f"{part}: {missing}")
        self.rows.append({"part": part, "missing": missing, **more})

    def network(self, name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
        """Random weights, made where they are used."""
        import transformers

        torch.manual_seed(0)
        with torch.device(self.device):
            config = transformers.LlamaConfig(**self.size.models[name])
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)

    def batch(self, tokens: int, vocabulary: int) -> Batch:
        rows = max(1, tokens // self.size.width)
        draw = torch.Generator().manual_seed(0)
        drawn = torch.randint(vocabulary, (rows, self.size.width), generator=draw)
        ones = torch.ones_like(drawn, dtype=torch.bool).to(self.device)
        return Batch(drawn.to(self.device), ones, ones)

    def in_16_bits(self, name: str) -> None:
        self.engines(name, self.network(name))

    def in_float32(self, name: str) -> None:
        self.engines(name, self.network(name, torch.float32), dtype="float32")

    def few_bits(self, name: str, bits: int) -> None:
        self.engines(name, packed(self.network(name), bits), bits)

    def engines(self, name: str, network: Any, bits: int = 16, dtype: str = "bfloat16") -> None:
        model, _ = adopt(ModelObject(network, None))
        weights = select_parameters(model.network, "all")
        kind = f"{name}, {dtype if bits == 16 else f'{bits} bits'}"
        forward = dict[int, float]()

        def forward_pass(tokens: int) -> None:
            batch = self.batch(tokens, model.vocabulary)
            forward[tokens], _ = self.measured(partial(mean_logliks, model), batch, network)
            self.rate(f"{kind}, forward pass", batch, forward[tokens])

        for tokens in self.size.batch_tokens:
            self.part(f"{kind}, forward pass, {tokens} tokens", partial(forward_pass, tokens))
        for engine, rank in ways(bits, dtype):
            own_rank = self.size.rank if rank else None
            label = f"{kind}, {engine}, {f'rank {own_rank}' if rank else 'full'}"
            way = engine, own_rank, bits
            for tokens, seconds in forward.items():
                work = partial(self.engine, label, model, weights, way, seconds, tokens)
                self.part(f"{label}, {tokens} tokens", work)

    def engine(
        self,
        label: str,
        model: CausalLM,
        weights: Parameters,
        way: tuple[str, int | None, int],
        forward: float,
        tokens: int,
    ) -> None:
        name, rank, bits = way
        batch = self.batch(tokens, model.vocabulary)
        score = ENGINES[name](model, weights, [direction_of(model, weights, rank)])
        seconds, peak = self.measured(score, batch, model.network)
        more: Row = {"peak_bytes": peak}
        if name == "reverse":
            more["planned_bytes"] = planned(model.network.config, weights, batch, rank, bits)
        self.rate(label, batch, seconds, forward=forward, **more)

    def measured(
        self, call: Callable[[Batch], object], batch: Batch, network: nn.Module
    ) -> tuple[float, int]:
        """Seconds of a batch, and bytes at the highest, with the weights."""
        if self.device.type != "cuda":
            with DryRun(network.parameters()) as seen:
                call(batch)
            peak = weight_bytes(network) + seen.peak
        else:
            torch.cuda.reset_peak_memory_stats(self.device)
            call(batch)
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        times, start = list[float](), time.perf_counter()
        while len(times) < 3 and (not times or time.perf_counter() - start < SECONDS):
            before = time.perf_counter()
            call(batch)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - before)
        return median(times), peak

    def rate(self, label: str, batch: Batch, seconds: float, **more: Any) -> None:
        tokens = batch.tokens.numel()
        row: Row = {"part": label, "batch_tokens": tokens, "seconds": seconds, **more}
        at = f"{label}, {tokens:,} tokens"
        self.rows.append(row)
        self.figures.append(figure(at, tokens / seconds, "tokens a second", ""))
        if "forward" in more:
            ratio = seconds / more["forward"]
            self.figures.append(figure(f"{at}: time", ratio, "× a forward pass", ""))
        if "planned_bytes" in more:
            ratio = more["peak_bytes"] / more["planned_bytes"]
            self.figures.append(figure(f"{at}: peak memory", ratio, "× the plan", "≤ 1.2"))

    def two_gpus(self, name: str) -> None:
        """Scores on the first GPU, and of the same network spread over all."""
        if torch.cuda.device_count() < 2:
            raise PrismError("fewer than two GPUs")
        network = self.network(name)
        model, _ = adopt(ModelObject(network, None))
        weights = select_parameters(network, "all")
        direction = direction_of(model, weights, self.size.rank)
        batch = self.batch(self.size.batch_tokens[0], model.vocabulary)
        one = ENGINES["reverse"](model, weights, [direction])(batch).values
        shapes = network_of(network.config)
        devices = place(shapes, free_memory(), scoring_share(shapes, ModelOptions(), "all"))
        for part, device in devices.items():
            network.get_submodule(part).to(device)
        model, _ = adopt(ModelObject(network, None))
        weights = select_parameters(network, "all")
        engine = ENGINES["reverse"](model, weights, beside([direction], weights))
        two = engine(batch).values
        seconds, _ = self.measured(engine, batch, network)
        label = f"{name}, bfloat16, {len(model.devices)} GPUs, reverse, rank {self.size.rank}"
        self.rate(label, batch, seconds, devices=[*map(str, model.devices)])
        apart = float((two - one).norm() / one.norm())
        self.figures.append(figure(f"{label}: scores off those of one", apart, "", "≤ 0.02"))

    def whole_run(self, name: str) -> None:
        """`prism score` of a model in memory, as a user runs it."""
        from transformers import AutoTokenizer

        import prism_select
        from prism_select.demo import world
        from prism_select.demo.train import MODEL_DIR

        tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        pool, pairs = world.pool(60, 0)[: self.size.rows], world.pairs("capitals", 12, 0)
        network = self.network(name)
        rank: Any = str(self.size.rank)
        run = prism_select.score(network, pool, pairs, tokenizer=tokenizer, rank=rank)
        manifest = run.manifest
        engine, actual = manifest["engine"], manifest["actual"]
        self.rows.append(
            {
                "part": f"{name}, a run",
                "engine": engine,
                "timings": manifest["timings"],
                "actual": actual,
            }
        )
        score = manifest["timings"]["score"]
        rate = actual["tokens"] / score
        self.figures.append(figure(f"{name}, a run: scoring", rate, "tokens a second", ""))
        beside = 1 - score / manifest["timings"]["total"]
        self.figures.append(figure(f"{name}, a run: time beside scoring", beside, "share", ""))


def ways(bits: int, dtype: str) -> list[tuple[str, int | None]]:
    """Engines, and the rank of their direction."""
    if bits < 16:
        return [("reverse", RANK)]
    if dtype == "float32":
        return [("reverse", RANK), ("difference", None)]
    return [("reverse", RANK), ("reverse", None), ("forward", None)]


def direction_of(model: CausalLM, weights: Parameters, rank: int | None) -> Factored:
    """Random, where the weights are; of low rank as a run has it from the start."""

    def of(weight: Tensor) -> Tensor | Factors:
        device = model.device if weight.is_meta else weight.device
        random = partial(torch.randn, device=device, dtype=model.dtype)
        if rank is None or weight.ndim != 2 or min(weight.shape) <= rank:
            return random(*weight.shape)
        return Factors(random(len(weight), rank), random(rank, weight.shape[1]))

    torch.manual_seed(1)
    return {name: of(weight) for name, weight in weights.items()}


def planned(config: Any, weights: Parameters, batch: Batch, rank: int | None, bits: int) -> int:
    """Bytes of scoring along one direction, as --dry-run has them."""
    model = CausalLM(network_of(config))
    selected = {name: dict(model.network.named_parameters())[name] for name in weights}
    rows, width = batch.tokens.shape
    scoring = scoring_along(model, selected, (rows, width), rank, 1)
    return weight_bytes(model.network, bits) + scoring.direction_bytes + scoring.batch_bytes


def packed(network: Any, bits: int) -> Any:
    """The network with the matrices of its blocks in few bits, one after the other."""
    bitsandbytes: Any = import_module("bitsandbytes.nn")
    for name, module in list(network.named_modules()):
        if not isinstance(module, nn.Linear) or ".layers." not in f".{name}":
            continue
        shape, device = (module.in_features, module.out_features), module.weight.device
        if bits == 4:
            made = bitsandbytes.Linear4bit(*shape, bias=False, quant_type="nf4")
            made.weight = bitsandbytes.Params4bit(
                module.weight.data.cpu(), requires_grad=False, quant_type="nf4"
            )
        else:
            made = bitsandbytes.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
            made.weight = bitsandbytes.Int8Params(
                module.weight.data.cpu(), requires_grad=False, has_fp16_weights=False
            )
        network.set_submodule(name, made.to(device))
    return network


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny models, on a CPU too")
    parser.add_argument("--out", type=Path, help="where --small writes its JSON")
    given = parser.parse_args(words)
    if not given.small and not torch.cuda.is_available():
        raise SystemExit("no GPU here: run it where one is, or give --small to try it on a CPU")
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    bench = Bench(SMALL if given.small else CARD, device)
    bench.run()
    if not all(math.isfinite(line["value"]) for line in bench.figures):
        raise SystemExit("a figure is not finite")
    WORK.mkdir(parents=True, exist_ok=True)
    small = given.out or WORK / "small.json"
    write(str(small.absolute()) if given.small else "gpu.json", bench.rows, bench.figures)


if __name__ == "__main__":
    main()
