"""What kronfluence 1.0.1 and bergson 2.5.1 score: called by lds.py, in an environment where both
are installed.

    python benchmarks/lds_peers.py FOLDER      reads the model, the tokenizer and rows.json there,
                                               writes scores.json

    kronfluence   score of a row towards J; it tracks every linear layer, the head too
    bergson       Σ over pairs of weight · (towards the chosen answer − towards the rejected one),
                  each towards the mean loss of that answer; weight 1: its own `contrast`; weight π:
                  the gradient of J; no head in any of it

Choices made here: both as they come, on a CPU: labels drawn from the model, float32, the summed
loss of a row; damping is the default of each (1e-8; 0.1 of a layer's mean eigenvalue), then
kronfluence's other rule (None: 0.1 of the mean) and, of bergson, the 1 that stands for this library
in lds.py. Neither scores embeddings or norms. Both keep one column for each answer, since a score
is linear in its target: the columns of a skill are added up here. EK-FAC is fitted once for each
draw of labels."""

import json
import shutil
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from kronfluence_agreement import gain_task, padded
from torch import Tensor
from transformers import LlamaForCausalLM

Scores = dict[str, list[Tensor]]


def kronfluence(folder: Path, given: dict[str, Any]) -> Scores:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    rows, queries = padded(given["rows"]), padded(given["chosen"] + given["rejected"])
    shape = (2, *torch.tensor(given["weights"]).shape)
    task = gain_task(shape)

    found = Scores()
    model = prepare_model(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), task)
    analyzer = Analyzer(
        "lds", model, task, cpu=True, disable_tqdm=True, output_dir=str(folder / "kronfluence")
    )

    def score(strategy: str, damping: float | None) -> Tensor:
        analyzer.compute_pairwise_scores(
            scores_name="scores",
            factors_name=strategy,
            query_dataset=queries,
            train_dataset=rows,
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=16,
            score_args=ScoreArguments(damping_factor=damping),
            overwrite_output_dir=True,
        )
        values: Tensor = analyzer.load_pairwise_scores("scores")["all_modules"]
        return values.view(*shape, -1).sum((0, 2)).T

    for draw in range(given["draws"]):
        torch.manual_seed(draw)
        for strategy, dampings in (("identity", (None,)), ("ekfac", (1e-8, None)))[draw > 0 :]:
            fit: dict[str, Any] = {
                "factors_name": strategy,
                "factor_args": FactorArguments(strategy=strategy),
            }
            analyzer.fit_all_factors(
                dataset=rows, per_device_batch_size=16, overwrite_output_dir=True, **fit
            )
            for damping in dampings:
                name = f"kronfluence {strategy}" + (
                    f", damping {damping}" if strategy == "ekfac" else ""
                )
                found.setdefault(name, []).append(score(strategy, damping))
    return found


def bergson(folder: Path, given: dict[str, Any]) -> Scores:
    from bergson.build import build_query
    from bergson.cli.commands import Score
    from bergson.config import (
        DataConfig,
        HessianConfig,
        HessianPipelineConfig,
        IndexConfig,
        InversionConfig,
        PreprocessConfig,
        QuerySetConfig,
        ScoreConfig,
    )
    from bergson.data import load_scores
    from bergson.hessians.pipeline import hessian_pipeline
    from datasets import Dataset

    for name, rows in (("rows", given["rows"]), ("queries", given["chosen"] + given["rejected"])):
        labels = [[t if counts else -100 for t, counts in zip(*row, strict=True)] for row in rows]
        Dataset.from_dict(
            {"input_ids": [tokens for tokens, _ in rows], "labels": labels}
        ).save_to_disk(folder / name)
    place = folder / "bergson"
    shutil.rmtree(place, ignore_errors=True)  # of a call that was stopped
    data = DataConfig(dataset=str(folder / "rows"))
    index = IndexConfig(
        run_path=str(place / "query"),
        overwrite=True,
        model=str(folder),
        data=data,
        token_batch_size=256,
    )
    query = deepcopy(index)
    query.loss_reduction = "mean"
    built = build_query(query, QuerySetConfig(dataset=str(folder / "queries")), PreprocessConfig())
    weights, found = torch.tensor(given["weights"]), Scores()
    for name, damping in (("plain", None), ("ekfac", 0.1), ("ekfac", 1.0)):
        for draw in range(given["draws"] if damping else 1):
            torch.manual_seed(draw)
            index.run_path = str(place / f"{name} {damping} {draw}")
            if damping is None:
                Score(ScoreConfig(query_path=built), index, PreprocessConfig()).execute()
                values = load_scores(Path(index.run_path))[:]
            else:
                solving = HessianPipelineConfig(
                    query=QuerySetConfig(path=built),
                    inversion_cfg=InversionConfig(damping_factor=damping),
                )
                fit = HessianConfig(method="kfac", ev_correction=True)
                hessian_pipeline(index, fit, ScoreConfig(), PreprocessConfig(), solving)
                values = load_scores(Path(index.run_path) / "scores")[:]
            chosen, rejected = (
                torch.tensor(values, dtype=torch.float64).view(-1, 2, *weights.shape).unbind(1)
            )
            for kind, weight in (("contrast", torch.ones_like(weights)), ("J", weights)):
                title = f"bergson {name} of {kind}" + (f", damping {damping}" if damping else "")
                found.setdefault(title, []).append(((chosen - rejected) * weight).mean(2))
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    given = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    found = kronfluence(folder, given) | bergson(folder, given)
    told = {name: [values.tolist() for values in draws] for name, draws in found.items()}
    (folder / "scores.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
