"""A loaded model, a Dataset, dicts and data frames give what their files give."""

import pydoc
import random
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import peft
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import CHATML, jsonl, prism, save_model

import prism_select
from prism_select.data.files import read_rows
from prism_select.demo import world
from prism_select.run.errors import BadOption, BadRow, RunMismatch
from prism_select.run.objects import in_reach

PAIRS: list[dict[str, Any]] = [
    {"prompt": "Where is Rome?", "chosen": "In Italy, thank you.", "rejected": "no way"},
    {"prompt": "Say Paris", "chosen": "Please, Paris.", "rejected": "Go away."},
    {"prompt": "Water?", "chosen": "It boils at a hundred degrees.", "rejected": "At 7."},
]
POOL: list[dict[str, Any]] = [
    {
        "prompt": f"Question {index}?",
        "completion": f"Answer {index}" + ", please" * (index % 3),
        "is_bad": index % 4 == 0,
        "weight": index / 2,
    }
    for index in range(12)
]
SETTINGS: dict[str, Any] = {"layers": "late", "budget": "50%"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objects")
    save_model(folder / "model", CHATML)
    jsonl(folder / "pool.jsonl", POOL)
    jsonl(folder / "pairs.jsonl", PAIRS)
    return folder


@pytest.fixture(scope="module")
def by_files(folder: Path) -> prism_select.Run:
    names = str(folder / "model"), str(folder / "pool.jsonl"), str(folder / "pairs.jsonl")
    return prism_select.select(*names, out=folder / "by_files", **SETTINGS)


@pytest.fixture
def network(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder / "model")


def numbers(run: prism_select.Run) -> list[float]:
    scores: list[float] = run.scores["score"].to_pylist()
    return scores


POOLS: dict[str, Any] = {
    "dataset": lambda: datasets.Dataset.from_list(POOL),
    "list": lambda: POOL,
    "pandas": lambda: pd.DataFrame(POOL),
    "polars": lambda: pl.DataFrame(POOL),
    "arrow": lambda: pa.Table.from_pylist(POOL),
}


@pytest.mark.parametrize("kind", POOLS)
def test_rows_in_memory_score_and_are_chosen_as_those_of_a_file(
    kind: str, folder: Path, by_files: prism_select.Run, network: Any, tokenizer: Any
) -> None:
    run = prism_select.select(
        network, pool=POOLS[kind](), target=PAIRS, tokenizer=tokenizer, layers="late", budget=0.5
    )
    assert numbers(run) == numbers(by_files)
    assert list(run.selected) == list(by_files.selected)
    assert run.scores["file"].to_pylist() == ["memory:pool"] * 12
    assert run.scores["line"].to_pylist() == list(range(12))
    assert run.scores["source"].to_pylist() == ["pool"] * 12
    chosen = run.selected_dataset()
    rows = [row for row, verdict in zip(POOL, verdicts(run), strict=True) if verdict == "selected"]
    assert chosen.to_list() == rows and chosen.column_names == list(POOL[0])
    assert chosen.features["weight"].dtype == "float64"
    assert chosen.features["is_bad"].dtype == "bool"
    assert run.report().read_text(encoding="utf-8").startswith("<!")


def verdicts(run: prism_select.Run) -> list[str]:
    found: list[str] = run.scores["verdict"].to_pylist()
    return found


def test_the_selected_rows_of_files_keep_their_types(folder: Path, tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": pa.array([row["prompt"] for row in POOL], pa.large_string()),
            "completion": [row["completion"] for row in POOL],
            "small": pa.array(range(12), pa.int8()),
        }
    )
    pq.write_table(table, tmp_path / "pool.parquet", row_group_size=5)
    parts: dict[str, Any] = {"target": str(folder / "pairs.jsonl"), "layers": "late"}
    run = prism_select.select(str(folder / "model"), str(tmp_path / "pool.parquet"), **parts)
    assert run.selected_dataset().features["small"].dtype == "int8"
    assert run.selected_dataset()["small"][:] == [row["small"] for row in run.selected]
    both = [str(tmp_path / "pool.parquet"), str(folder / "pool.jsonl")]
    run = prism_select.select(str(folder / "model"), both, budget="100%", **parts)
    with pytest.raises(BadOption, match=r"read selected\.jsonl instead"):
        run.selected_dataset()


def test_a_repair_gives_the_kept_rows(folder: Path, network: Any, tokenizer: Any) -> None:
    pool = datasets.Dataset.from_list(POOL)
    run = prism_select.repair(
        network, pool, PAIRS, tokenizer=tokenizer, remove=3, label_field="is_bad", layers="late"
    )
    assert len(run.selected_dataset()) == 9 == verdicts(run).count("kept")
    assert run.manifest["counts"]["removed"] == 3


def test_a_bad_row_is_named_by_its_index(network: Any, tokenizer: Any) -> None:
    rows: list[Any] = [*POOL, {"prompt": "a", "completion": " "}, 7]
    with pytest.raises(BadRow, match=r"^pool\[12\]: empty completion"):
        prism_select.score(network, rows, PAIRS, tokenizer=tokenizer, bad_rows="stop")
    run = prism_select.score(network, rows, PAIRS, tokenizer=tokenizer, max_bad=0.5, layers="late")
    assert [(row["line"], row["reason"]) for row in run.quarantine] == [
        (12, "empty completion"),
        (13, "int where a dict was expected"),
    ]
    with pytest.raises(BadRow, match=r"^target\[1\]: missing field: rejected"):
        prism_select.score(
            network, POOL, [PAIRS[0], {"prompt": "a", "chosen": "b"}], tokenizer=tokenizer
        )


def test_a_large_dataset_is_never_held_as_python_objects(tmp_path: Path) -> None:
    rows = {"prompt": ["Question?"] * 100_000, "completion": ["answer " * 20] * 100_000}
    pq.write_table(pa.table(rows), tmp_path / "pool.parquet")
    del rows
    pool = datasets.Dataset.from_parquet(
        str(tmp_path / "pool.parquet"), cache_dir=str(tmp_path / "cache")
    )
    with in_reach({"memory:pool": pool}):
        next(iter(read_rows("memory:pool")))
        tracemalloc.start()
        assert sum(raw.fields is not None for raw in read_rows("memory:pool")) == 100_000
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2 << 20


def test_a_model_is_given_back_as_it_came(folder: Path, network: Any, tokenizer: Any) -> None:
    network.train()
    network.model.embed_tokens.weight.requires_grad_(False)
    network.lm_head.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run = prism_select.score(network, POOL, PAIRS, tokenizer=tokenizer)
    assert network.training and not network.lm_head.training
    assert [p.requires_grad for p in network.parameters()].count(False) == 1
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    evaluated = prism_select.score(network.eval(), POOL, PAIRS, tokenizer=tokenizer)
    assert numbers(run) == numbers(evaluated)
    assert not any(p.grad is not None for p in network.parameters())


def test_a_model_that_fails_is_given_back_too(network: Any, tokenizer: Any) -> None:
    network.train()
    with pytest.raises(BadOption, match="no weight matches"):
        prism_select.score(network, POOL, PAIRS, tokenizer=tokenizer, layers="nothing")
    assert network.training and all(p.requires_grad for p in network.parameters())


def test_a_peft_model_scores_in_its_adapter_or_as_if_merged(
    folder: Path, tokenizer: Any, network: Any, tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted: Any = peft.get_peft_model(network, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    for layers in ("adapter", "late"):
        run = prism_select.score(adapted, POOL, PAIRS, tokenizer=tokenizer, layers=layers)
        files = prism_select.score(
            str(folder / "model"),
            POOL,
            PAIRS,
            adapter=str(tmp_path / "adapter"),
            layers=layers,
        )
        assert numbers(run) == pytest.approx(numbers(files), rel=1e-3, abs=1e-6)
    assert any(p.requires_grad for name, p in adapted.named_parameters() if "lora" in name)


def test_what_is_given_as_an_object_has_a_fingerprint(
    network: Any, tokenizer: Any, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"tokenizer": tokenizer, "layers": "late", "out": tmp_path / "run"}
    first = prism_select.score(network, POOL, PAIRS, **given)
    assert (first.path / "manifest.json").stat().st_mtime_ns == (
        prism_select.score(network, list(POOL), PAIRS, **given).path / "manifest.json"
    ).stat().st_mtime_ns
    with pytest.raises(RunMismatch, match="pool contents"):
        prism_select.score(network, POOL[::-1], PAIRS, **given)
    with pytest.raises(RunMismatch, match="target contents"):
        prism_select.score(network, POOL, PAIRS[:2], **given)
    with torch.no_grad():
        network.model.norm.weight[3] += 1e-3
    with pytest.raises(RunMismatch, match="model contents"):
        prism_select.score(network, POOL, PAIRS, **given)


def test_targets_and_pools_may_be_several_and_mixed(
    folder: Path, network: Any, tokenizer: Any
) -> None:
    targets = {"polite": PAIRS[:2], "facts": pd.DataFrame(PAIRS[2:])}
    pools = [datasets.Dataset.from_list(POOL[:5]), str(folder / "pool.jsonl")]
    run = prism_select.score(network, pools, targets, tokenizer=tokenizer, layers="late")
    assert {"score:polite", "score:facts"} <= set(run.scores.column_names)
    assert run.manifest["counts"]["read"] == 17
    assert run.scores["file"].to_pylist()[:5] == ["memory:pool-0"] * 5


def test_a_run_is_opened_from_its_folder(by_files: prism_select.Run, tmp_path: Path) -> None:
    run = prism_select.Run(str(by_files.path))
    assert run.scores.to_pandas()["score"].tolist() == numbers(by_files)
    assert run.selected_dataset().to_list() == list(by_files.selected)
    assert run.report() == run.path / "report.html"
    with pytest.raises(BadOption, match="no complete run there"):
        prism_select.Run(tmp_path)


def test_choosing_again_takes_a_run_or_its_folder_with_the_pool(
    network: Any, tokenizer: Any
) -> None:
    run = prism_select.select(network, POOL, PAIRS, tokenizer=tokenizer, layers="late")
    again = prism_select.select(select_from=run, budget=3)
    assert verdicts(again).count("selected") == 3 == len(again.selected_dataset())
    by_folder = prism_select.select(pool=POOL, select_from=str(run.path), budget=3)
    assert verdicts(by_folder) == verdicts(again)
    with pytest.raises(BadOption, match="given its pool as a Python object"):
        prism_select.select(select_from=str(run.path), budget=3)


@pytest.mark.parametrize("as_file", [True, False])
def test_another_pool_beside_scores_is_refused(
    as_file: bool, folder: Path, by_files: prism_select.Run
) -> None:
    pool: Any = str(folder / "pool.jsonl") if as_file else POOL
    with pytest.raises(BadOption, match="--select-from takes scores as they are: leave out --pool"):
        prism_select.select(pool=pool, select_from=by_files, budget=3)


@pytest.mark.parametrize("name", ["model", "pool", "target"])
def test_evaluate_takes_no_other_files_than_those_of_the_run(
    name: str, folder: Path, by_files: prism_select.Run
) -> None:
    with pytest.raises(BadOption, match=f"{name}: evaluate takes that of the run"):
        prism_select.evaluate(by_files, PAIRS, **{name: str(folder / "other")})


def test_a_run_without_a_folder_goes_with_its_object(network: Any, tokenizer: Any) -> None:
    run = prism_select.score(network, POOL, PAIRS, tokenizer=tokenizer, layers="late")
    path = run.path
    assert path.exists()
    del run
    assert not path.exists()


def test_evaluate_takes_a_run_of_objects(network: Any, tokenizer: Any, tmp_path: Path) -> None:
    network.train()
    run = prism_select.select(network, POOL, PAIRS, tokenizer=tokenizer, layers="late", budget=4)
    holdout = [{**pair, "prompt": f"{pair['prompt']} Now."} for pair in PAIRS]
    options: dict[str, Any] = {"against": "random", "seeds": 1, "steps": 1}
    figures = prism_select.evaluate(run, holdout, **options)
    assert figures["pairs"] == 3
    assert network.training and all(p.requires_grad for p in network.parameters())


def test_pairs_are_made_and_checked_from_objects(
    network: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"question": f"2 + {n}?", "answer": f"It is {2 + n}."} for n in range(9)]
    made = prism_select.make_pairs(rows, "numbers")
    lines = made.read()
    assert made.pairs == len(lines) == 9 and made.path.exists()
    told = prism_select.check_pairs(lines, network, tokenizer=tokenizer, layers="late")
    assert told["pairs"] == 9


@pytest.mark.parametrize(
    ("pool", "says"),
    [
        (datasets.DatasetDict(), "pool: DatasetDict has no rows to read; give one split"),
        ((row for row in POOL), "pool: generator has no rows to read; give a list or a Dataset"),
        (7, "pool: int has no rows to read; give a file name, a datasets.Dataset"),
        ([[1]], "pool: list has no rows to read|pool: int has no rows"),
        (pd.DataFrame({"text": ["a", {}]}), r"pool\[0\] to \[1\]: a column mixes types"),
    ],
)
def test_what_has_no_rows_is_refused(pool: Any, says: str, network: Any, tokenizer: Any) -> None:
    with pytest.raises(BadOption, match=says):
        prism_select.score(network, pool, PAIRS, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tokenizer": None}, "tokenizer is missing"),
        ({"dtype": "bfloat16"}, "dtype: a loaded model is taken as it is"),
        ({"adapter": "folder"}, "adapter: a loaded model is taken as it is"),
        ({"warmup": "50%"}, "warmup: a loaded model is taken as it is"),
        ({"runtime": "ray"}, "objects in memory are in reach of one process alone"),
        ({"runtime": "ray:actors=1"}, "objects in memory are in reach of one process alone"),
    ],
)
def test_an_option_that_cannot_hold_for_objects_is_refused(
    options: dict[str, Any], says: str, network: Any, tokenizer: Any
) -> None:
    with pytest.raises(BadOption, match=says):
        prism_select.score(network, POOL, PAIRS, **{"tokenizer": tokenizer, **options})


def test_other_things_than_models_are_refused(tokenizer: Any) -> None:
    with pytest.raises(BadOption, match="a Linear is no causal language model"):
        prism_select.score(torch.nn.Linear(2, 2), POOL, PAIRS, tokenizer=tokenizer)
    with pytest.raises(BadOption, match="only a loaded model takes one"):
        prism_select.score("folder", POOL, PAIRS, tokenizer=tokenizer)


def test_the_command_line_says_that_a_run_needs_its_objects(
    network: Any, tokenizer: Any, tmp_path: Path
) -> None:
    run = prism_select.score(
        network, POOL, PAIRS, tokenizer=tokenizer, layers="late", out=tmp_path / "run"
    )
    done = prism("score", "--config", run.path / "config.toml", "--out", tmp_path / "other")
    assert done.code == 2 and "was given its" in done.err and "Python object" in done.err


def test_a_model_in_mixed_precision_scores_in_its_own_and_keeps_its_forward_pass(
    by_files: prism_select.Run, network: Any, tokenizer: Any
) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # that of an earlier test
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(network)
    AcceleratorState._reset_state()
    forward = prepared.forward
    run = prism_select.select(prepared, POOL, PAIRS, tokenizer=tokenizer, **SETTINGS)
    assert numbers(run) == numbers(by_files)
    assert prepared.forward == forward


@pytest.mark.parametrize(
    "options", [{"near_duplicates": 0.8}, {"cascade": True}, {"curvature": "ekfac"}], ids=str
)
def test_a_selection_leaves_the_random_numbers_of_a_program_alone(
    options: dict[str, Any], network: Any, tokenizer: Any
) -> None:
    def states() -> list[Any]:
        return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]

    before = states()
    prism_select.select(network, POOL, PAIRS, tokenizer=tokenizer, **SETTINGS, **options)
    assert states() == before


def tensors(tokenizer: Any, answers: Iterator[str]) -> dict[str, torch.Tensor]:
    """As a data collator of TRL makes them: padding and prompt have the label -100."""
    texts = [tokenizer(answer).input_ids for answer in answers]
    width = max(map(len, texts))
    batch = {
        "input_ids": torch.zeros(len(texts), width, dtype=torch.long),
        "attention_mask": torch.zeros(len(texts), width, dtype=torch.long),
        "labels": torch.full((len(texts), width), -100),
    }
    for row, ids in enumerate(texts):
        batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, 2 : len(ids)] = torch.tensor(ids[2:])
    return batch


def test_tensors_of_a_trainer_score_as_the_definition_says(network: Any, tokenizer: Any) -> None:
    chosen = tensors(tokenizer, iter([pair["chosen"] for pair in PAIRS]))
    rejected = tensors(tokenizer, iter([pair["rejected"] for pair in PAIRS]))
    batch = tensors(tokenizer, iter([row["completion"] for row in POOL[:4]]))
    network.train()
    direction = prism_select.target_direction(network, chosen, rejected, layers="late")
    scores = prism_select.score_tensors(network, batch, direction)
    assert network.training and all(p.requires_grad for p in network.parameters())
    network.eval()
    for row, score in enumerate(scores.tolist()):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        network.zero_grad()
        output = network(**one)  # its loss is the mean over the tokens that have a label
        (-output.loss * (one["labels"][:, 1:] != -100).sum()).backward()
        known = dict(network.named_parameters())
        exact = sum((known[name].grad * value).sum().item() for name, value in direction.items())
        assert score == pytest.approx(exact, rel=1e-4)


def test_labels_that_are_not_the_tokens_are_refused(network: Any, tokenizer: Any) -> None:
    batch = tensors(tokenizer, iter(["please"]))
    batch["labels"][0, -1] = 5
    with pytest.raises(ValueError, match="labels"):
        prism_select.target_direction(network, batch, batch)


def test_fields_may_be_a_dict(network: Any, tokenizer: Any) -> None:
    asked = [{"ask": row["prompt"], "reply": row["completion"]} for row in world.pool(30, 0)]
    pairs = [
        {"q": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in world.pairs("capitals", 6, 0)
    ]
    names = {"prompt": ["ask", "q"], "completion": "reply"}
    given = {"pool": asked, "target": pairs, "tokenizer": tokenizer}
    by_dict = prism_select.score(network, fields=names, **given)
    by_text = prism_select.score(network, fields="prompt=ask,prompt=q,completion=reply", **given)
    assert by_dict.scores["score"].to_pylist() == by_text.scores["score"].to_pylist()


def test_an_option_that_no_command_has_is_named_with_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"select has no option budgett; did you mean budget\?"):
        prism_select.select("model", "pool.jsonl", "pairs.jsonl", budgett="5%")


@pytest.mark.parametrize("name", ["score", "select", "repair", "evaluate", "make_pairs"])
def test_help_shows_each_option_with_its_type_and_what_it_does(name: str) -> None:
    told = pydoc.plain(pydoc.render_doc(getattr(prism_select, name)))
    assert "Annotated" not in told and "<Mark" not in told
    assert re.search(r"\bseed: int = 0\b", told) and re.search(r"\n +seed: .* drawn\.", told)
