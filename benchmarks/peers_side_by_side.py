"""Do dattri-llm 0.1.0 and dattri 0.3.0 find the same scores, and what must their user write? On the
bundled demo model, 200 rows of its pool, 40 pairs, without curvature.

    make peers        installs both beside kronfluence and bergson; this part takes five minutes on
                      one core

This script writes tokens to a file and calls itself in the peers' environment, where nothing of
PRISM is imported. Both peers score a row by the inner product of its gradient with that of a target
function (their TracIn at one checkpoint), which says the gain here.

Choices made here:
- ours are the scores of `prism_select.score(..., curvature="flat")`, of the layers that each peer
  covers: dattri-llm as it comes takes linear layers and embeddings, dattri all parameters;
- dattri-llm's queries are the answers, whose scores add up; dattri's are pairs, whose mean counts;
- dattri projects gradients to 512 numbers, whatever its constructor is given: once so, with three
  seeds (the interval is from least to most), and once with its attribute set to None;
- "chosen alone" is dattri-llm without a target function: towards the log-likelihood of the chosen
  answers;
- lines are those of the functions below that turn tokens into scores, without docstrings: reading
  files, templates and tokens come on top. Nothing is timed."""

import ast
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from kronfluence_agreement import MODEL, PYTHON, WORK, Row, padded
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

ROWS, PAIRS, SEEDS = 200, 40, 3
LINEAR = r"layers\.\d+\.(self_attn|mlp)|lm_head|embed_tokens"
Given = dict[str, list[Row]]


def logliks(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows,): of the supervised tokens of each row."""
    losses = functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
    )
    return -losses.sum(1)


def gains(logits: Tensor, labels: Tensor) -> Tensor:
    """(pairs,): the chosen answers stand first, then the rejected ones."""
    chosen, rejected = (logliks(logits, labels) / (labels[:, 1:] >= 0).sum(1)).chunk(2)
    return functional.softplus(chosen - rejected)


def dattri_llm_scores(given: Given, paired: bool = True) -> list[float]:
    from dattri_llm import AttributionArguments, AttributionTask, TracInAttributor

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return -logliks(logits, batch["labels"]).sum()

    def target(model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return -gains(logits, batch["labels"]).mean()

    queries = padded(given["chosen"] + given["rejected"] if paired else given["chosen"])
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    task = AttributionTask(loss, model, target_func=target if paired else None)
    with tempfile.TemporaryDirectory() as folder:
        arguments = AttributionArguments(folder, per_device_eval_batch_size=len(queries))
        scores = TracInAttributor(arguments, task=task).attribute(padded(given["rows"]), queries)
    found: list[float] = scores.scores.sum(1).tolist()
    return found


def dattri_scores(given: Given, seed: int | None) -> list[float]:
    from dattri.algorithm import TracInAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader, TensorDataset

    network = LlamaForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation="eager"
    )

    def logits(weights: dict[str, Tensor], tokens: Tensor, mask: Tensor) -> Tensor:
        whole: Tensor = torch.func.functional_call(
            network, weights, (tokens,), {"attention_mask": mask}
        ).logits
        return whole

    def loss(weights: dict[str, Tensor], row: Sequence[Tensor]) -> Tensor:
        tokens, mask, labels = (part[None] for part in row)
        return -logliks(logits(weights, tokens, mask), labels).sum()

    def target(weights: dict[str, Tensor], pair: Sequence[Tensor]) -> Tensor:
        tokens, mask, labels = pair
        return -gains(logits(weights, tokens, mask), labels).sum()

    def loader(rows: list[Row], answers: int) -> Any:
        columns = zip(*(row.values() for row in padded(rows)), strict=True)
        parts = [torch.stack(column) for column in columns]
        if answers == 2:
            parts = [part.unflatten(0, (2, -1)).transpose(0, 1) for part in parts]
        return DataLoader(TensorDataset(*parts), batch_size=len(parts[0]))

    task = AttributionTask(loss, network, network.state_dict(), target_func=target)
    choices = {"projector_kwargs": {"proj_seed": seed}} if seed is not None else {}
    attributor = TracInAttributor(task, torch.ones(1), normalized_grad=False, **choices)
    if seed is None:
        attributor.projector_kwargs = None
    pairs = loader(given["chosen"] + given["rejected"], 2)
    found: list[float] = attributor.attribute(loader(given["rows"], 1), pairs).mean(1).tolist()
    return found


def theirs() -> None:
    """Run in the peers' environment: {way: scores of the rows}."""
    torch.set_num_threads(1)
    given = json.loads((WORK / "side.json").read_text(encoding="utf-8"))
    found = {
        "dattri-llm": dattri_llm_scores(given),
        "dattri-llm, chosen alone": dattri_llm_scores(given, paired=False),
        "dattri": dattri_scores(given, None),
    }
    for seed in range(SEEDS):
        found[f"dattri, projected, seed {seed}"] = dattri_scores(given, seed)
    (WORK / "side_theirs.json").write_text(json.dumps(found), encoding="utf-8")


def ours() -> dict[str, list[float]]:
    """{layers: scores of the rows}; their tokens are left in a file."""
    from transformers import AutoTokenizer

    import prism_select
    from prism_select.demo import world
    from prism_select.demo.train import encode

    pool, pairs = world.pool(ROWS, 0), world.pairs(world.DEMO_SKILL, PAIRS, 0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def coded(prompt: str, answer: str) -> Row:
        tokens, labels = encode(tokenizer, {"prompt": prompt, "completion": answer})
        return tokens, [label >= 0 for label in labels]

    given = {"rows": [coded(row["prompt"], row["completion"]) for row in pool]}
    for side in ("chosen", "rejected"):
        given[side] = [coded(pair["prompt"], pair[side]) for pair in pairs]
    (WORK / "side.json").write_text(json.dumps(given), encoding="utf-8")
    found = {}
    for layers in ("all", LINEAR):
        run = prism_select.score(str(MODEL), pool, pairs, curvature="flat", layers=layers)
        found[layers] = run.scores["score"].to_pylist()
    return found


def lines_of(functions: Sequence[Callable[..., Any]]) -> int:
    """Lines of code, without docstrings and empty lines."""
    count = 0
    for function in functions:
        text = inspect.getsource(function)
        body = ast.parse(text).body[0]
        assert isinstance(body, ast.FunctionDef)
        first = body.body[0] if ast.get_docstring(body) else None
        told = range(first.lineno, (first.end_lineno or 0) + 1) if first else range(0)
        lines = enumerate(text.splitlines(), 1)
        count += sum(bool(line.strip()) and number not in told for number, line in lines)
    return count


def main() -> None:
    import numpy as np
    from results_file import figure, write

    from prism_select.core.statistics import rank_correlation

    torch.set_num_threads(1)
    WORK.mkdir(exist_ok=True)
    mine = ours()
    subprocess.run(
        [str(PYTHON), "-W", "ignore", __file__, "theirs"],
        check=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    other = json.loads((WORK / "side_theirs.json").read_text(encoding="utf-8"))

    def agreement(way: str, layers: str) -> float:
        return rank_correlation(np.array(other[way]), np.array(mine[layers]))

    figures = [
        figure("dattri-llm, its layers", agreement("dattri-llm", LINEAR), "ρ", "≥ 0.999"),
        figure("dattri-llm, all layers of ours", agreement("dattri-llm", "all"), "ρ", ""),
        figure("dattri, unprojected", agreement("dattri", "all"), "ρ", "≥ 0.999"),
    ]
    drawn = [agreement(f"dattri, projected, seed {seed}", "all") for seed in range(SEEDS)]
    ends = min(drawn), max(drawn)
    figures.append(figure("dattri, projected", float(np.median(drawn)), "ρ", "", ends))
    alone = agreement("dattri-llm, chosen alone", LINEAR)
    figures.append(figure("dattri-llm, chosen alone", alone, "ρ", ""))
    shared: list[Callable[..., Any]] = [padded, logliks, gains]
    for name, function in (("dattri-llm", dattri_llm_scores), ("dattri", dattri_scores)):
        figures.append(figure(f"{name}, lines", lines_of([*shared, function]), "lines", ""))
    rows = [{"way": f"ours, {layers}", "scores": values} for layers, values in mine.items()]
    rows += [{"way": way, "scores": values} for way, values in other.items()]
    write("peers_side_by_side.json", rows, figures)


if __name__ == "__main__":
    theirs() if sys.argv[1:] == ["theirs"] else main()
