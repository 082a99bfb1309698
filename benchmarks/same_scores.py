"""Does PRISM, rearranged inside, still give the same scores, choices, pairs and directions?

    models, pools and pairs from seeds → `python -m prism_select …`, as users type it → digests

Only the command line and the documented files of a run folder are used, so that this file runs
unchanged before and after. The demo and some thirty small runs cover architectures, commands,
engines, weightings, layers and options. Each column of scores.parquet and pairs.parquet, each kind
of tensor in direction.safetensors, and the rows chosen and removed have a SHA-256 digest of their
own (of `file` without its folder). Bits depend on the processor and on the versions of libraries:
make the record from the commit before, on the machine where you compare with it. On one thread
every run repeats itself to the last bit, the one with training before it (`warmup`) too.

    git worktree add --detach ../base COMMIT
    python benchmarks/same_scores.py --write --source ../base     # results/same_scores.json
    python benchmarks/same_scores.py                              # exit 1 where something differs

`--source DIR` runs DIR/src, `--only NAME` one run, and `--keep DIR` keeps models, inputs and run
folders for a closer look. Where models and inputs themselves (`inputs`) are not those of the
record, the machine or the libraries are others, and the record says nothing about PRISM.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # one thread: sums in one order

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from peft import LoraConfig, get_peft_model
from results_file import RESULTS, figure, write
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

RECORD = "same_scores.json"
AT_ONCE = 2
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXT = """the capital of France is Paris and two plus three makes five please answer with a polite
    word or do not thank you very much no way go away Rome Italy water boils at hundred degrees"""
WORDS = TEXT.split()
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
SMALL = {
    **SIZES,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.15,
}
FEW = {**SMALL, "num_key_value_heads": 2}
NAMES = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1}
SLIDING = {
    "head_dim": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**FEW, tie_word_embeddings=False),
    "gemma3": lambda: transformers.Gemma3TextConfig(**FEW, **SLIDING),
    "gpt2": lambda: transformers.GPT2Config(
        **NAMES, n_embd=32, n_layer=4, n_head=4, n_positions=256
    ),
    "qwen2": lambda: transformers.Qwen2Config(**FEW, tie_word_embeddings=False),
    "qwen3": lambda: transformers.Qwen3Config(**FEW, head_dim=8, tie_word_embeddings=True),
    "mixtral": lambda: transformers.MixtralConfig(
        **FEW, num_local_experts=4, num_experts_per_tok=2
    ),
    "mamba": lambda: transformers.MambaConfig(
        **NAMES, hidden_size=32, state_size=4, num_hidden_layers=3, time_step_rank=4, pad_token_id=1
    ),
    "neox": lambda: transformers.GPTNeoXConfig(**SMALL),
    "falcon": lambda: transformers.FalconConfig(**SMALL, multi_query=True, parallel_attn=True),
}


# What a run says of everything that a default might change; of a saved direction, only part of it.
BASE = {
    "--pool": "rows.jsonl",
    "--target": "pairs.jsonl",
    "--layers": "all",
    "--weighting": "prism",
    "--curvature": "flat",
    "--engine": "reverse",
    "--normalize": "none",
    "--dtype": "float32",
    "--device": "cpu",
    "--template": "plain",
}
SETTLED = ("--target", "--layers", "--weighting", "--curvature")
SHORT = {
    "FAIR": "--per-source 30% --near-duplicates 0.8",
    "THREE": "--target one=one.jsonl --target two=two.jsonl --target three=three.jsonl",
    "CHATS": "--pool chats.jsonl",
    "MIXED": "--pool broken.jsonl --pool texts.csv",
    "PART": r"layers\.[12]\..*(q_proj|down_proj|up_proj)",
}
TABLE = """
demo              demo
cascade           select llama   --cascade --budget 5% --engine difference --pool many.jsonl
cascade-repair    repair qwen2   --cascade --remove 10% --pool many.jsonl
llama-late        select llama   --layers late --budget 50% FAIR
llama-tokens      score  llama   --engine forward --tokens
llama-chat        select llama   --template chat --common remove --budget 5% CHATS
llama-adapter     score  llama   --adapter lora-llama --layers adapter --weighting uniform
llama-ekfac       repair llama   --curvature ekfac --damping 0.1 --remove 10% --label-field bad
llama-bad-rows    select llama   --max-bad 20% --budget 5% MIXED
llama-cut         score  llama   --max-length 50 --max-bad 40% --batch-tokens 96 --pool parts
llama-bfloat16    score  llama   --dtype bfloat16 --engine auto
gemma3-norm       select gemma3  --normalize norm --budget positive
gemma3-unpaired   score  gemma3  --weighting unpaired --engine difference --skip-end --template chat
gpt2-tokens       select gpt2    --engine difference --normalize tokens --budget 20tok
gpt2-adapter      score  gpt2    --adapter lora-gpt2 --engine forward
qwen2-rank        select qwen2   --rank 4 --budget 5%
qwen2-diagonal    score  qwen2   --curvature diagonal --layers last:2 --damping 0.1
qwen3-reference   repair qwen3   --engine reference --anchor 0.2 --remove 15% --label-field bad
qwen3-expression  score  qwen3   --layers PART --skip-end
mixtral-experts   score  mixtral --engine forward --weighting hard
mixtral-attention repair mixtral --layers self_attn --remove 100tok
mamba-all         score  mamba   --engine difference
neox-forward      select neox    --engine forward --budget 5%
falcon-last       repair falcon  --layers last:1 --remove positive
targets-mean      select llama   --combine mean --budget 12 THREE
targets-max       select neox    --combine max --budget 5% THREE
targets-in-turn   select qwen3   --combine round-robin --budget 10% THREE
warmup            score  llama   --warmup 20%
direction         score  llama   --direction runs/llama-late/direction.safetensors CHATS
again             select         --select-from runs/targets-mean --budget 50% FAIR
again-by-tokens   select         --select-from runs/llama-tokens --normalize tokens --budget 40%
"""


@dataclass(frozen=True)
class Run:
    """One line of the table: a command with the options that differ from BASE."""

    name: str
    command: str
    model: str
    words: tuple[str, ...]

    @property
    def after(self) -> str:
        """The run whose files this one reads."""
        return next((word.split("/")[1] for word in self.words if word.startswith("runs/")), "")

    @property
    def line(self) -> list[str]:
        """All words after `prism`; paths are relative to the folder of this benchmark."""
        words = list(self.words)
        if self.model:
            left_out = {*words, *(SETTLED if "--direction" in words else ())}
            for option, value in {"--model": self.model, **BASE}.items():
                words += [] if option in left_out else [option, value]
        return [self.command, *words, "--out", f"runs/{self.name}"]


def run_of(line: str) -> Run:
    name, command, *rest = line.split()
    model = rest.pop(0) if rest and rest[0] in MODELS else ""
    words = [word for short in rest for word in SHORT.get(short, short).split()]
    return Run(name, command, model, tuple(words))


RUNS = [run_of(line) for line in TABLE.strip().splitlines()]


# ---------------------------------------------------------------- models and files, from seeds


def said(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def rows(count: int, seed: int, first: int = 0) -> list[dict[str, Any]]:
    """Prompts with completions of four sources; every ninth row is nearly the one before."""
    draw, made = random.Random(seed), list[dict[str, Any]]()
    for place in range(first, first + count):
        row = {
            "prompt": f"Question {place}: {said(draw, 2, 6)}?",
            "completion": said(draw, 2, 14),
            "id": f"row-{place}",
            "source": draw.choice(["web", "books", "chat", "code"]),
            "bad": draw.random() < 0.2,
        }
        if place % 9 == 8 and made:
            row |= {"prompt": made[-1]["prompt"], "completion": made[-1]["completion"] + " very"}
        made.append(row)
    return made


def chats(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {
            "messages": [
                {"role": "system", "content": said(draw, 2, 3)},
                {"role": "user", "content": said(draw, 2, 5)},
                {"role": "assistant", "content": said(draw, 1, 8)},
                {"role": "user", "content": said(draw, 1, 3)},
                {"role": "assistant", "content": said(draw, 1, 6)},
            ]
        }
        for _ in range(count)
    ]


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {"prompt": f"{said(draw, 2, 5)}?", "chosen": said(draw, 1, 7), "rejected": said(draw, 1, 7)}
        for _ in range(count)
    ]


def save_lines(path: Path, lines: Iterable[Mapping[str, Any] | str]) -> None:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")


def save_files(folder: Path) -> None:
    """Pools of several forms, one with bad rows, and pairs."""
    save_lines(folder / "rows.jsonl", rows(120, 1))
    save_lines(folder / "many.jsonl", rows(600, 2))
    save_lines(folder / "chats.jsonl", chats(60, 3))
    broken: list[Mapping[str, Any] | str] = list(rows(60, 4))
    broken[5:5] = ["{not json", {"prompt": "nothing to learn"}, {"prompt": 3, "completion": ["?"]}]
    save_lines(folder / "broken.jsonl", [*broken, ""])
    with (folder / "texts.csv").open("w", encoding="utf-8", newline="") as file:
        draw = random.Random(5)
        csv.writer(file).writerows([["text"], *([said(draw, 3, 15)] for _ in range(40))])
    (folder / "parts").mkdir()
    for part in range(2):
        pq.write_table(
            pa.Table.from_pylist(rows(40, 6 + part, 40 * part)),
            folder / "parts" / f"{part}.parquet",
        )
    for place, (name, count) in enumerate((("pairs", 12), ("one", 8), ("two", 6), ("three", 6))):
        save_lines(folder / f"{name}.jsonl", pairs(count, 10 + place))


def save_models(folder: Path) -> None:
    """Random weights, no bias zero and no norm one. Two of them have a LoRA adapter."""
    tokenizer = make_tokenizer()
    for place, (name, config) in enumerate(MODELS.items()):
        torch.manual_seed(place)
        network = transformers.AutoModelForCausalLM.from_config(config(), dtype=torch.float32)
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
        network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if name in ("llama", "gpt2"):
            save_adapter(folder / f"lora-{name}", network, transposed=name == "gpt2")


def make_tokenizer() -> Any:
    """Byte-level BPE with a few merges."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment, unused-ignore]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment, unused-ignore]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([" ".join(WORDS)], trainer)
    core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment, unused-ignore]
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>"
    )
    made.chat_template = CHATML
    return made


def save_adapter(folder: Path, network: Any, transposed: bool) -> None:
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules="all-linear",
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(network, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(0.1 * torch.randn_like(weight))
    adapted.save_pretrained(str(folder), save_embedding_layers=False)


# ---------------------------------------------------------------- runs


def execute(run: Run, folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Digests by file and column, or why there are none under the name `failed`."""
    command = [sys.executable, "-m", "prism_select", *run.line]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        told = (done.stderr.strip() or "nothing on standard error").splitlines()[-1]
        return {"failed": f"exit code {done.returncode}: {told}"}
    out = folder / "runs" / run.name
    if run.command != "demo":
        return digests(out)
    return {
        f"{part}/{k}": v for part in ("select", "repair") for k, v in digests(out / part).items()
    }


def execute_all(chosen: Sequence[Run], folder: Path, source: str) -> dict[str, dict[str, str]]:
    """Two at a time; first those that need no other run."""
    environment = dict(os.environ)
    if source:
        parts = [str(Path(source).resolve() / "src"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, parts))
    names = {run.after for run in chosen} | {run.name for run in chosen}
    needed = [run for run in RUNS if run.name in names]
    found: dict[str, dict[str, str]] = {}
    with ThreadPoolExecutor(AT_ONCE) as workers:
        for later in (False, True):
            wave = [run for run in needed if bool(run.after) == later]
            results = workers.map(lambda run: execute(run, folder, environment), wave)
            for run, columns in zip(wave, results, strict=True):
                found[run.name] = columns
                print(
                    f"ran {run.name}: {columns.get('failed', 'done')}", file=sys.stderr, flush=True
                )
    return {run.name: found[run.name] for run in chosen}


# ---------------------------------------------------------------- digests


def digest(content: bytes | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def digests(run: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("scores.parquet", "pairs.parquet"):
        if (run / name).exists():
            found |= {f"{name}:{column}": value for column, value in columns(run / name).items()}
    for name in ("selected.jsonl", "removed.jsonl"):
        if (run / name).exists():
            found[name] = digest((run / name).read_bytes())
    if (run / "direction.safetensors").exists():
        found |= tensors(run / "direction.safetensors")
    return found


def columns(path: Path) -> dict[str, str]:
    """Of each column type and values in order; the shortest decimals of a number tell its bits."""
    table = pq.read_table(path)
    found = {}
    for name in table.schema.names:
        values = table[name].to_pylist()
        if name == "file":
            values = [value and Path(value).name for value in values]
        found[name] = digest(f"{table[name].type} {values!r}")
    return found


def tensors(path: Path) -> dict[str, str]:
    """By what stands before the weight's name: nothing, `chosen`, `target:NAME`."""
    kinds: dict[str, list[str]] = {}
    for name, tensor in sorted(load_file(path).items()):
        kind = name.rpartition("/")[0]
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        kinds.setdefault(kind, []).append(
            f"{name} {tensor.dtype} {list(tensor.shape)} {digest(content)}"
        )
    return {
        f"{path.name}:{kind or 'direction'}": digest("\n".join(each))
        for kind, each in kinds.items()
    }


def inputs(folder: Path) -> dict[str, str]:
    """Of weights, tokenizers, pools and pairs, before anything ran."""
    wanted = ("*.safetensors", "tokenizer.json", "*.jsonl", "*.csv", "*.parquet")
    files = sorted(path for pattern in wanted for path in folder.rglob(pattern))
    return {str(path.relative_to(folder)): digest(path.read_bytes()) for path in files}


def whole(found: Mapping[str, str]) -> str:
    return digest("\n".join(f"{name} {value}" for name, value in sorted(found.items())))


# ---------------------------------------------------------------- the record


def record(found: Mapping[str, Mapping[str, str]], seconds: float) -> int:
    """Nothing is written when a run failed."""
    failed = [name for name, columns in found.items() if "failed" in columns]
    if failed:
        print(f"not written: these runs failed: {', '.join(failed)}")
        return 1
    commands = {run.name: " ".join(["prism", *run.line]) for run in RUNS}
    lines = [
        {
            "run": name,
            "command": commands.get(name, ""),
            "digest": whole(columns),
            "columns": columns,
        }
        for name, columns in found.items()
    ]
    every = sum(len(columns) for name, columns in found.items() if name != "inputs")
    write(
        RECORD,
        lines,
        [
            figure("runs that are recorded", len(found) - 1, "runs", "≥ 13"),
            figure("columns, files and kinds of tensors", every, "digests", ""),
            figure("time of all runs, two at once", seconds, "s", ""),
        ],
    )
    return 0


def compare(found: Mapping[str, Mapping[str, str]]) -> int:
    """A line for each run. A column that the record does not have is no difference."""
    content = json.loads((RESULTS / RECORD).read_text(encoding="utf-8"))
    before = {line["run"]: line["columns"] for line in content["rows"]}
    differing = 0
    for name, columns in found.items():
        recorded: Mapping[str, str] = before.get(name, {})
        changed = [
            column if column in columns else f"{column} (gone)"
            for column in sorted(recorded)
            if recorded[column] != columns.get(column)
        ]
        new = len(set(columns) - set(recorded))
        why = "" if recorded else "not in the record"
        why = columns.get("failed") or why or ", ".join(changed)
        print(f"{name}: {'DIFFERS: ' + why if why else f'same, {new} columns are new'}")
        differing += bool(why)
    print(
        f"{len(found) - differing} of {len(found)} are the same, models and inputs counted as one"
    )
    return int(differing > 0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Are scores the same, to the last bit, as those of the record?"
    )
    parser.add_argument(
        "--write", action="store_true", help="make the record; else compare with it"
    )
    parser.add_argument("--source", default="", help="run DIR/src instead of the installed package")
    parser.add_argument(
        "--only", default="", choices=["", *(run.name for run in RUNS)], help="one run"
    )
    parser.add_argument(
        "--keep", default="", help="new folder for models, inputs and runs, which stay there"
    )
    given = parser.parse_args()
    if given.write and given.only:
        parser.error("a record has all runs: leave out --only")
    chosen = [run for run in RUNS if given.only in ("", run.name)]
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.keep or temporary)
        folder.mkdir(parents=True, exist_ok=not given.keep)
        save_models(folder)
        save_files(folder)
        made, began = inputs(folder), time.perf_counter()
        found = {"inputs": made, **execute_all(chosen, folder, given.source)}
        seconds = time.perf_counter() - began
    return record(found, seconds) if given.write else compare(found)


if __name__ == "__main__":
    sys.exit(main())
