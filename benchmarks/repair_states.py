"""The two baselines of repair.py that need the model again: projection difference, which writes an
answer to every row, and concept influence, which scores along a direction of its own.

    python benchmarks/repair_states.py --data DIR      half an hour on two cores; resumes

One split of each family of repair.py, the pool with 30% bad rows, by `prism repair --rank-by`. The
score of the run itself, over the upper half of the blocks, stands beside them."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from real import WORK, model
from repair_gradients import FAMILIES
from repair_ways import Family, split_of
from results_file import figure, write

import prism_select

HERE, SHARE = WORK / "repair-states", 0.3
NAMES = ("projection-difference", "concept-influence")


def files_of(family: Family) -> dict[str, Any]:
    """Pool and pairs of the first split."""
    split, folder = split_of(family, 0), HERE / family.name
    folder.mkdir(parents=True, exist_ok=True)
    pool = [family.rows[row] for row in split.pools[SHARE]]
    lines = {
        "pool": [{"prompt": p, "completion": a, "is_bad": bool(bad)} for _, bad, p, a in pool],
        "target": [
            {
                "prompt": family.rows[g][2],
                "chosen": family.rows[g][3],
                "rejected": family.rows[b][3],
            }
            for g, b in split.pairs.tolist()
            if family.rows[g][3] != family.rows[b][3]
        ],
    }
    for name, rows in lines.items():
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    rows = list[dict[str, Any]]()
    for name in FAMILIES:
        given = files_of(Family.load(name, data))
        for baseline in NAMES:
            run = prism_select.repair(
                str(model()),
                **given,
                layers="late",
                template="plain",
                label_field="is_bad",
                rank_by=baseline,
                out=HERE / name / baseline,
            )
            labels = run.manifest["choice"]["labels"]
            found = {"auroc": labels["auroc_rank_by"], "of the score": labels["auroc"]}
            rows.append({"family": name, "baseline": baseline, "rows": labels["rows"], **found})
            print(rows[-1], flush=True)
    figures = []
    for baseline in NAMES:
        own = [row for row in rows if row["baseline"] == baseline]
        line = f"mean over {len(own)} families, one split, bad share 30%: {baseline}"
        figures.append(figure(line, float(np.mean([row["auroc"] for row in own])), "AUROC", ""))
    scores = float(np.mean([row["of the score"] for row in own]))
    line = f"mean over {len(own)} families, one split, bad share 30%: the run's score, upper half"
    figures.append(figure(line, scores, "AUROC", ""))
    write("repair_states.json", rows, figures)


if __name__ == "__main__":
    main()
