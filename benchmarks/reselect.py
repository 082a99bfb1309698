"""Choosing again during training, against choosing once: the demo world, the bundled model, the
same number of steps.

    once      select before training
    rounds    select again after a third and two thirds of the steps
    random    as many rows, drawn at random

Each has the same adapter and order of draws for a seed.

Writes results/rounds.json.
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from results_file import figure, write
from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from prism_select.core.statistics import paired_interval
from prism_select.data.encoding import Encoder
from prism_select.data.targets import read_target
from prism_select.demo.story import MODEL
from prism_select.demo.world import DEMO_SKILL, pairs, pool
from prism_select.directions.pair_encoding import as_side, encode_sides
from prism_select.evaluation.retraining import mean_logliks_of
from prism_select.models.loading import load
from prism_select.models.lora_training import QUIET

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from rounds import Rounds

POOL, TARGET, HELD_OUT, SEEDS, ROWS_A_STEP, RATE = 2000, 40, 100, 3, 8, 1e-3
LENGTHS = (36, 108)


def main() -> None:
    """All methods, lengths and seeds."""
    torch.set_num_threads(1)
    disable_progress_bar()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in (
            ("pool", pool(POOL, 0)),
            ("target", pairs(DEMO_SKILL, TARGET, 0)),
            ("held_out", pairs(DEMO_SKILL, HELD_OUT, 1)),
        ):
            (folder / f"{file}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in content), encoding="utf-8"
            )
        rows = [
            tried(folder, method, steps, seed)
            for steps in LENGTHS
            for seed in range(SEEDS)
            for method in ("once", "rounds", "random")
        ]
    write("rounds.json", rows, figures(rows))


def tried(folder: Path, method: str, steps: int, seed: int) -> dict[str, Any]:
    """One training: gaps of the held-out pairs after it, and what was chosen."""
    torch.manual_seed(seed)
    model, tokenizer = load(str(MODEL), "float32", torch.device("cpu"))
    rounds = Rounds(
        3 if method == "rounds" else 1,
        folder / f"{method}-{steps}-{seed}",
        pool=folder / "pool.jsonl",
        target=folder / "target.jsonl",
        rank_by="random" if method == "random" else None,
        seed=seed,
    )
    learner = get_peft_model(
        model.network, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    )
    trainer(rounds, learner, tokenizer, folder, steps, seed).train()
    model.network.eval()
    encoder = Encoder(tokenizer, "auto", 256)
    coded = encode_sides(read_target(str(folder / "held_out.jsonl"), {}), encoder)
    chosen, rejected = mean_logliks_of(model, [as_side(side, 4096, model.device) for side in coded])
    print(method, steps, seed, float((chosen - rejected).mean()), flush=True)
    skills = [row["source"] for row in pool(POOL, 0)]
    choices = [rows for _, rows in rounds.chosen.choices]
    return {
        "method": method,
        "steps": steps,
        "seed": seed,
        "gaps": (chosen - rejected).tolist(),
        "shares": [float(np.mean([skills[row] == DEMO_SKILL for row in each])) for each in choices],
        "overlaps": [len({*a} & {*b}) / len(a) for a, b in pairwise(choices)],
    }


def trainer(
    rounds: Rounds, learner: Any, tokenizer: Any, folder: Path, steps: int, seed: int
) -> SFTTrainer:
    settings = SFTConfig(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=ROWS_A_STEP,
        max_steps=steps,
        learning_rate=RATE,
        use_cpu=True,
        seed=seed,
        **QUIET,
    )
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
            }
            for row in pool(POOL, 0)
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        made = SFTTrainer(
            model=learner,
            args=settings,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[rounds],
        )
    made.remove_callback(PrinterCallback)
    return made


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds and pairs, and differences with their 95% intervals."""
    told = []
    for steps in LENGTHS:
        gaps = {
            method: np.array(
                [row["gaps"] for row in rows if (row["method"], row["steps"]) == (method, steps)]
            )
            for method in ("random", "once", "rounds")
        }
        for method, each in gaps.items():
            told.append(
                figure(
                    f"{steps} steps, {method}: gain", float(gain(each).mean()), "nats per token", ""
                )
            )
            told.append(
                figure(f"{steps} steps, {method}: win rate", float((each > 0).mean()), "share", "")
            )
        for name, measure, unit in (("gain", gain, "nats per token"), ("win rate", won, "share")):
            apart = measure(gaps["rounds"]) - measure(gaps["once"])
            told.append(
                figure(
                    f"{steps} steps, rounds more than once: {name}",
                    float(apart.mean()),
                    unit,
                    "",
                    paired_interval(apart, 0),
                )
            )
        overlap = np.mean(
            [row["overlaps"] for row in rows if (row["method"], row["steps"]) == ("rounds", steps)]
        )
        told.append(
            figure(
                f"{steps} steps: rows of a choice that the next one keeps",
                float(overlap),
                "share",
                "",
            )
        )
    return told


def gain(gaps: Any) -> Any:
    return np.logaddexp(0, gaps)


def won(gaps: Any) -> Any:
    return (gaps > 0).astype(float)


if __name__ == "__main__":
    main()
