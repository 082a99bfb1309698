"""Products of the gradients of rows of four kinds, and their hidden states, kept on disk.

    python benchmarks/repair_gradients.py --data DIR      half an hour on two cores; resumes

Gemma-3-270M (base), bfloat16, the matrices of its blocks. Four families of pairs: TruthfulQA's
right and wrong answers, polite and rude ones, safe and insecure code, right and wrong solutions.

Choices made here:
- questions are chosen once, by a seed, among those that are short enough; a split draws the
  target's and the pool's among them; insecure code has a pool of its own;
- matrices of the blocks alone: not the embeddings, which are the head, nor the norms;
- long families (code, solutions) have fewer rows, of fewer tokens, since products are of all
  rows with each other: that a pool is small shows in its intervals."""

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real import WORK, asked, lines, model, said

from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.records import Example, Turn
from prism_select.directions.answer_products import answer_products
from prism_select.directions.pair_encoding import as_side
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import select_parameters
from prism_select.models.loading import load
from prism_select.selection.hidden_states import answer_states, layers_of

FOLDER, SEED = WORK / "repair", 5
FAMILIES = ("truthfulqa", "polite", "code", "math")
LONGEST = {"truthfulqa": 128, "polite": 160, "code": 140, "math": 85}
QUESTIONS = {"truthfulqa": 230, "polite": 210, "code": 80, "math": 130}
GOOD_OF_CODE, BAD_OF_CODE = 77, 33

Row = tuple[int, bool, str, str]  # question, whether its answer is bad, prompt, answer


def questions_of(family: str, data: Path, draw: random.Random) -> list[tuple[str, str, str]]:
    """Prompt, good and bad answer of every question that is short enough, shuffled."""
    if family == "truthfulqa":
        found = [
            (asked(r["prompt"]), said(r["chosen"]), said(r["rejected"]))
            for r in lines(data / "truthfulqa_pairs.jsonl")
        ]
    elif family == "polite":
        found = [
            (
                "\n".join(filter(None, (r["instruction"], r["input"]))) + "\n",
                r["chosen"],
                r["rejected"],
            )
            for r in lines(data / "polite_rude_pairs.json")
        ]
    else:
        found = [
            (f"{r['prompt']}\n", r["chosen"], r["rejected"])
            for r in lines(data / f"repair_{family}_pairs.jsonl")
        ]
    found = list({prompt: (prompt, good, bad) for prompt, good, bad in found}.values())
    draw.shuffle(found)
    return [r for r in found if len(r[0]) + max(len(r[1]), len(r[2])) < 4 * LONGEST[family]]


def rows_of(family: str, data: Path) -> list[Row]:
    """Both answers of each question; insecure code: of its pairs, and then one row a question."""
    draw = random.Random(SEED)
    found = questions_of(family, data, draw)
    rows = [
        (question, bad, prompt, answers[bad])
        for question, (prompt, *answers) in enumerate(found[: QUESTIONS[family]])
        for bad in (False, True)
    ]
    if family == "code":
        pool = [
            r
            for r in lines(data / "repair_code_pool.jsonl")
            if text_length(r) < 4 * LONGEST[family]
        ]
        draw.shuffle(pool)
        rows += [
            (1000 + k, bad, f"{r['prompt']}\n", r["completion"])
            for bad, count in ((False, GOOD_OF_CODE), (True, BAD_OF_CODE))
            for k, r in [(k, r) for k, r in enumerate(pool) if bool(r["is_bad"]) == bad][:count]
        ]
    return rows


def text_length(row: dict[str, Any]) -> int:
    return len(row["prompt"]) + len(row["completion"])


def encoded(encoder: Encoder, row: Row) -> Encoded:
    turns = (Turn("user", row[2]), Turn("assistant", row[3]))
    return encoder.encode(Example(turns, "", "", "", 0, 1))


def mean_states(lm: CausalLM, rows: Sequence[Encoded]) -> np.ndarray:
    """(layers, rows, width): mean over the answer's tokens of each block's output."""
    layers, means, order = layers_of(lm.network), list[torch.Tensor](), list[int]()
    for indices in plan_batches([len(row.tokens) for row in rows], 512):
        with torch.no_grad():
            batch = collate([rows[i] for i in indices], lm.device)
            means.append(torch.stack(answer_states(lm, batch, layers)))
        order += indices
    return torch.cat(means, dim=1)[:, torch.tensor(order).argsort()].numpy()


def prepare(family: str, data: Path, folder: Path = FOLDER, network: Path | None = None) -> Path:
    """The products and states of a family's rows at a model, made once."""
    path = folder / f"{family}.npz"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    lm, tokenizer = load(str(network or model()), "bfloat16", torch.device("cpu"))
    encoder = Encoder(tokenizer, "plain", 256, lm.vocabulary)
    kept = rows_of(family, data)
    rows = [encoded(encoder, row) for row in kept]
    print(f"{family}: {len(rows)} rows, {sum(len(r.tokens) for r in rows)} tokens", flush=True)
    weights = select_parameters(lm.network, r"layers\..*proj\.weight")
    start = time.perf_counter()
    found = answer_products(lm, weights, as_side(rows, 512, lm.device))
    print(f"{family}: products took {time.perf_counter() - start:.0f} s", flush=True)
    numbered: dict[str, Any] = {
        f"block {name}": products.numpy() for name, products in found.blocks.items()
    }
    partial = path.with_suffix(".partial.npz")
    np.savez(
        partial,
        mean_loglik=found.mean_loglik.numpy(),
        tokens=found.tokens.numpy(),
        states=mean_states(lm, rows),
        question=np.array([row[0] for row in kept]),
        bad=np.array([row[1] for row in kept]),
        **numbered,
    )
    partial.rename(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    for family in FAMILIES:
        prepare(family, data)


if __name__ == "__main__":
    main()
