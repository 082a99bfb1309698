"""Does kronfluence 1.0.1 find the same scores? EK-FAC and flat, on the bundled demo model.

    make peers        installs kronfluence and bergson in an environment of their own, without
                      torchvision, whose build is not that of this torch; then about three minutes
                      on one core

This script writes tokens to a file and calls itself in kronfluence's own environment, where nothing
of PRISM is imported: there the log-likelihoods, the gain and its derivative are written once more.

Choices made here: all linear layers of the four blocks (no biases), float32, 40 pairs of one skill,
300 rows of the pool; labels as given (`use_empirical_fisher`), damping 0.1 of each layer's mean
eigenvalue (`damping_factor=None`). kronfluence scores each query; its queries here are the answers
of all pairs, and the sum of their scores is the gain's. Once with the output head and once without:
kronfluence's second moments of the head's inputs are over all tokens, ours over those that predict
a supervised one, where alone it is run."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

WORK = Path(__file__).parent / "work"
PYTHON = WORK / "peers" / "bin" / "python"
MODEL = Path(__file__).parent.parent / "src" / "prism_select" / "demo" / "model"
LAYERS = {
    "blocks": r"layers\.\d+\.(self_attn|mlp)",
    "blocks and head": r"layers\.\d+\.(self_attn|mlp)|lm_head",
}
ROWS, PAIRS = 300, 40
Row = tuple[list[int], list[bool]]


def padded(rows: Sequence[Row]) -> list[dict[str, Tensor]]:
    """Each row as kronfluence's data loader wants it: padded on the right to the longest."""
    width = max(len(tokens) for tokens, _ in rows)

    def filled(values: Sequence[int], filling: int) -> Tensor:
        return torch.tensor([*values, *[filling] * (width - len(values))])

    return [
        {
            "input_ids": filled(tokens, 0),
            "attention_mask": filled([1] * len(tokens), 0),
            "labels": filled(
                [t if counts else -100 for t, counts in zip(tokens, supervised, strict=True)], -100
            ),
        }
        for tokens, supervised in rows
    ]


def gain_task(shape: Sequence[int], names: list[str] | None = None) -> Any:
    """J as a task of kronfluence, whose queries are the chosen answers, then the rejected ones:
    `shape` is (2, targets, pairs), and the gains of all targets are added up. `names` are the
    layers that it tracks, all linear ones unless given. Labels are drawn from the model where it
    asks for a sample."""
    from kronfluence.task import Task

    def logliks(batch: dict[str, Tensor], model: Any, sample: bool = False) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
            :, :-1
        ]
        labels = batch["labels"][:, 1:]
        if sample:
            drawn = logits.detach().softmax(-1).flatten(0, 1).multinomial(1).view_as(labels)
            labels = torch.where(labels >= 0, drawn, labels)
        return -functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=-100, reduction="none"
        ).sum(1)

    class Gain(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            return -logliks(batch, model, sample).sum()

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            means = logliks(batch, model) / (batch["labels"][:, 1:] >= 0).sum(1)
            chosen, rejected = means.view(*shape)
            return (
                -functional.softplus(chosen - rejected).mean(-1).sum()
            )  # a loss, like that of training

        def get_influence_tracked_modules(self) -> list[str] | None:
            return names

        def get_attention_mask(self, batch: Any) -> Tensor:
            mask: Tensor = batch["attention_mask"]
            return mask

    return Gain()


def theirs(work: Path) -> None:
    """Run in kronfluence's environment: {layers and strategy: score of each row}."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    given = json.loads((work / "rows.json").read_text(encoding="utf-8"))
    rows, queries = padded(given["rows"]), padded(given["chosen"] + given["rejected"])

    found = {}
    for title, names in given["layers"].items():
        for strategy in ("identity", "ekfac"):
            task, place = gain_task((2, 1, -1), names), f"{title} {strategy}"
            model = prepare_model(
                LlamaForCausalLM.from_pretrained(given["model"], dtype=torch.float32), task
            )
            analyzer = Analyzer(
                place, model, task, cpu=True, disable_tqdm=True, output_dir=str(work / "influence")
            )
            arguments = FactorArguments(strategy=strategy, use_empirical_fisher=True)
            kept: dict[str, Any] = {"factors_name": strategy, "overwrite_output_dir": True}
            analyzer.fit_all_factors(
                dataset=rows, per_device_batch_size=16, factor_args=arguments, **kept
            )
            analyzer.compute_pairwise_scores(
                scores_name=strategy,
                query_dataset=queries,
                train_dataset=rows,
                per_device_query_batch_size=len(queries),
                per_device_train_batch_size=16,
                score_args=ScoreArguments(damping_factor=None),
                **kept,
            )
            found[place] = analyzer.load_pairwise_scores(strategy)["all_modules"].sum(0).tolist()
    (work / "theirs.json").write_text(json.dumps(found), encoding="utf-8")


def ours(work: Path) -> dict[str, list[float]]:
    """The same by this library, of the same tokens, which it leaves in a file."""
    from prism_select.core.engines import reverse
    from prism_select.core.target_gradient import target_gradient
    from prism_select.data.batches import collate, plan_batches
    from prism_select.data.encoding import Encoded
    from prism_select.demo import world
    from prism_select.demo.train import encode
    from prism_select.directions.curvature import ekfac
    from prism_select.directions.pair_encoding import as_side
    from prism_select.models.layer_selection import select_parameters
    from prism_select.models.loading import load

    cpu = torch.device("cpu")
    model, tokenizer = load(str(MODEL), "float32", cpu)

    def coded(prompt: object, answer: object) -> Encoded:
        tokens, labels = encode(tokenizer, {"prompt": str(prompt), "completion": str(answer)})
        return Encoded(tokens, [label >= 0 for label in labels], False)

    pairs = world.pairs(world.DEMO_SKILL, PAIRS, 0)
    rows = [coded(row["prompt"], row["completion"]) for row in world.mixture(ROWS, 0)]
    sides = [
        [coded(pair["prompt"], pair[side]) for pair in pairs] for side in ("chosen", "rejected")
    ]
    chosen, rejected = (as_side(side, 4096, cpu) for side in sides)
    plan = plan_batches([len(row.tokens) for row in rows], 2048)
    batches = [collate([rows[i] for i in batch]) for batch in plan]
    found, layers = dict[str, list[float]](), dict[str, list[str]]()
    for title, pattern in LAYERS.items():
        weights = select_parameters(model.network, pattern)
        layers[title] = [name.removesuffix(".weight") for name in weights]
        raw = target_gradient(model, weights, (chosen, rejected), "prism").direction
        divided = ekfac(model, weights, batches).solve(raw, 0.1)
        engine = reverse(model, weights, [raw, divided])
        values = torch.zeros(ROWS, 2, dtype=torch.float64)
        for batch, there in zip(batches, plan, strict=True):
            values[there] = engine(batch).values
        found[f"{title} identity"], found[f"{title} ekfac"] = values.T.tolist()
    plain = [[(list(row.tokens), list(row.supervised)) for row in part] for part in (rows, *sides)]
    told = dict(zip(("rows", "chosen", "rejected"), plain, strict=True)) | {
        "layers": layers,
        "model": str(MODEL),
    }
    (work / "rows.json").write_text(json.dumps(told), encoding="utf-8")
    return found


def main() -> None:
    import numpy as np
    from results_file import figure, write

    from prism_select.core.statistics import rank_correlation

    torch.set_num_threads(1)
    WORK.mkdir(exist_ok=True)
    mine = ours(WORK)
    subprocess.run(
        [str(PYTHON), __file__, "theirs"], check=True, env={**os.environ, "PYTHONPATH": ""}
    )
    other = json.loads((WORK / "theirs.json").read_text(encoding="utf-8"))
    figures = []
    for name, values in mine.items():
        a, b = np.array(values), np.array(other[name])
        error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
        figures.append(
            figure(f"rank correlation of scores, {name}", rank_correlation(a, b), "ρ", "≥ 0.99")
        )
        figures.append(figure(f"relative difference of scores, {name}", error, "share", ""))
    rows = [
        {"scores": name, "ours": values, "kronfluence": other[name]}
        for name, values in mine.items()
    ]
    write("kronfluence.json", rows, figures)


if __name__ == "__main__":
    theirs(WORK) if sys.argv[1:] == ["theirs"] else main()
