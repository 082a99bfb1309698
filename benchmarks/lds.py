"""Does curvature make scores foretell retraining? The linear datamodeling score (arXiv 2303.14186)
of each curvature, and of kronfluence 1.0.1 and bergson 2.5.1 at the same checkpoint, for the same
rows and pairs.

    LDS = rank correlation over random halves S of the rows of
          J after training on S   with   Σ_{z in S} score(z)

    make lds        about 35 minutes on one core; may be stopped, a stopped study resumes

A Llama of 246,080 numbers reads 16,000 rows of the demo world three times; then it is fine-tuned on
400 more, half of them wrong, or on each of 100 halves of these: same start, same schedule, all
weights. J is the gain over 40 pairs of one skill, whose prompts are in no row; the LDS is the mean
over the eight skills. Scores are taken where training on all rows ends.

Choices made here: `RUNS` was fixed before any score was looked at, by how far J depends on the rows
and not on their order. Of five schedules, the correlation of J between two orders (12 halves, mean
over skills) was 0.994 for 150 steps of Adam at 1e-3, 0.986 for 50; 0.985 for 150 steps of SGD with
momentum at 0.01, 0.988 for 50; 0.863 for 100 at 0.05. So: both of Adam. 50 steps stop early; 150
nearly know the rows by heart (0.12 nats per token against 0.76 on the other half). Curvature is
that of all 400 rows, with labels drawn from the model or (empirical) as given; intervals resample
halves. Set after a first look at 50 steps: the dampings of 10, and in the library a diagonal for
embeddings in place of one eigenvalue. The committed rows also have conjugate gradients (cg) on the
Gauss-Newton matrix, 30 steps, with the largest residual of each; the library has them no more.
Against the peers stands EK-FAC at a damping of 1, in both runs, fixed when their scores had not
been seen but these dampings' LDS had; what the peers do is in lds_peers.py. With one draw of labels
each, that bar fell short against kronfluence at None by 0.010 (-0.021 to 0.002) at 50 steps. But
another draw moves an LDS by 0.01, some by 0.07: so, from then on, whatever draws labels is the mean
of four fits, ours and theirs. Intervals leave these draws out. One fit to eight draws of each row
was added then too; no peer had as many."""

import json
import os
import random
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from results_file import figure, write
from safetensors.torch import load_file, save_file
from scipy.stats import rankdata
from torch.nn.functional import softplus
from transformers import LlamaConfig, LlamaForCausalLM

from prism_select.core.engines import reverse
from prism_select.core.gradients import differentiable
from prism_select.core.layers import Direction
from prism_select.core.likelihood import Batch, backward, mean_logliks
from prism_select.core.target_gradient import Side, target_gradient
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoding import Encoded
from prism_select.demo import world
from prism_select.demo.train import encode, make_tokenizer
from prism_select.directions.cross_validation import direction_coefficients
from prism_select.directions.curvature import diagonal, ekfac
from prism_select.directions.from_pairs import products_of
from prism_select.directions.pair_directions import direction_by_products
from prism_select.directions.pair_encoding import EncodedPairs, as_side
from prism_select.directions.way import way_of
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import select_parameters
from prism_select.run.config import ScoreConfig

HERE = Path(__file__).parent
WORK, PYTHON = HERE / "work" / "lds", HERE / "work" / "peers" / "bin" / "python"
Way: TypeAlias = tuple[str, float]
RUNS: Mapping[str, int] = {"50 steps": 50, "150 steps": 150}
ROWS, PAIRS, HALVES, TWICE, BATCH = 400, 40, 100, 12, 32
RATE, READING_RATE = 1e-3, 4e-3
DRAWS, MANY = 4, 8  # of labels: in fits of their own, and in one
FITTED = ("diagonal", "ekfac", "ekfac, empirical")
WAYS: Sequence[Way] = [
    ("flat", 0.0),
    *(("pairs", damping) for damping in (0.1, 0.3, 1.0, 10.0)),
    *((name, damping) for name in FITTED for damping in (0.01, 0.1, 1.0, 10.0)),
    *((f"ekfac, {MANY} draws", damping) for damping in (0.1, 1.0)),
]
COLUMNS = [(way, draw) for way in WAYS for draw in range(DRAWS if way[0] in FITTED[:2] else 1)]
WANTED: Sequence[Way] = [("ekfac", 0.1)]  # not worse than flat
BEST: Way = ("ekfac", 1.0)  # not worse than EK-FAC of kronfluence and of bergson
SHOWN: Way = (f"ekfac, {MANY} draws", 0.1)  # against them too


class ProcessGroup:
    """The model before fine-tuning, the rows, and both sides of each skill's pairs."""

    def __init__(self) -> None:
        corpus = world.corpus(16_000, 0)
        self.tokenizer = make_tokenizer([dict(row) for row in corpus])
        tokens = {
            f"{name}_token_id": getattr(self.tokenizer, f"{name}_token_id")
            for name in ("bos", "eos", "pad")
        }
        size = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        torch.manual_seed(0)
        self.model = CausalLM(
            LlamaForCausalLM(LlamaConfig(vocab_size=len(self.tokenizer), **size, **tokens))
        )
        self.weights = select_parameters(self.model.network, "all")
        self.rows = [
            self.coded(str(r["prompt"]), str(r["completion"])) for r in world.mixture(ROWS, 0, 0.5)
        ]
        pairs = [world.pairs(skill, PAIRS, 0) for skill in world.SKILLS]
        self.answers = [
            [[self.coded(pair["prompt"], pair[side]) for pair in each] for each in pairs]
            for side in ("chosen", "rejected")
        ]
        self.targets = [self.sides(*both) for both in zip(*self.answers, strict=True)]
        start = WORK / "start.safetensors"
        if not start.exists():
            self.train(
                [self.coded(r["prompt"], r["completion"]) for r in corpus], 750, READING_RATE, 0, 64
            )
            WORK.mkdir(parents=True, exist_ok=True)
            save_file(self.model.network.state_dict(), start)
        self.start = load_file(start)

    def coded(self, prompt: str, answer: str) -> Encoded:
        tokens, labels = encode(self.tokenizer, {"prompt": prompt, "completion": answer})
        return Encoded(tokens, [label >= 0 for label in labels], False)

    def sides(self, *answers: Sequence[Encoded]) -> tuple[Side, Side]:
        chosen, rejected = (as_side(rows, 4096, torch.device("cpu")) for rows in answers)
        return chosen, rejected

    def train(
        self, rows: Sequence[Encoded], steps: int, rate: float, seed: int, size: int = BATCH
    ) -> None:
        """Adam on the summed loss of a row, averaged over a batch; the rate warms up for 5% and
        falls to zero."""
        optimizer = torch.optim.Adam(self.weights.values(), lr=rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / (0.05 * steps + 1), (steps - step) / steps)
        )
        draw, order = random.Random(seed), list[int]()
        for _ in range(steps):
            if len(order) < size:
                order += draw.sample(range(len(rows)), len(rows))
            batch, order = collate([rows[i] for i in order[:size]]), order[size:]
            with differentiable(self.weights):
                backward(self.model, batch, torch.full((size,), -1 / size))
                torch.nn.utils.clip_grad_norm_(self.weights.values(), 5.0)
                optimizer.step()
            schedule.step()

    def retrained(self, rows: Sequence[int], steps: int, order: int) -> None:
        self.model.network.load_state_dict(self.start)
        self.train([self.rows[i] for i in rows], steps, RATE, 100 + order)

    def gaps(self) -> torch.Tensor:
        """[skill, pair]"""
        return torch.stack(
            [self.means(chosen) - self.means(rejected) for chosen, rejected in self.targets]
        )

    def gains(self) -> list[float]:
        """J of each skill."""
        return [float(each) for each in softplus(self.gaps()).mean(1)]

    def means(self, side: Side) -> torch.Tensor:
        means = torch.cat([mean_logliks(self.model, batch) for batch in side.batches])
        return torch.empty_like(means).index_copy_(0, torch.tensor(side.order), means)


def halves(rows: int, count: int, seed: int) -> np.ndarray:
    """[set, row]: random sets of half the rows each, rounded down; every row is in about half of
    the sets."""
    draw = np.random.default_rng(seed)
    members = np.zeros((count, rows), dtype=bool)
    for half in members:
        half[draw.choice(rows, rows // 2, replace=False)] = True
    return members


def retrainings(here: ProcessGroup, run: str) -> np.ndarray:
    """[order, half, skill]: J after training on each half; the second order is there for the first
    `TWICE`."""
    file, member = WORK / f"{run.replace(' ', '-')}.jsonl", halves(ROWS, HALVES, 0)
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    wanted = [(0, half) for half in range(HALVES)] + [(1, half) for half in range(TWICE)]
    with file.open("a", encoding="utf-8") as log:
        for order, half in wanted[len(lines) :]:
            here.retrained(np.flatnonzero(member[half]).tolist(), RUNS[run], order)
            lines.append(json.dumps({"order": order, "half": half, "gains": here.gains()}))
            print(lines[-1], file=log, flush=True)
    found = np.full((2, HALVES, len(here.targets)), np.nan)
    for line in map(json.loads, lines):
        found[line["order"], line["half"]] = line["gains"]
    return found


def directions(here: ProcessGroup, batches: Sequence[Batch]) -> Iterator[list[Direction]]:
    """For each column, one direction for each skill."""
    model, weights = here.model, here.weights
    raw = [target_gradient(model, weights, sides, "prism").direction for sides in here.targets]
    blocks = {("diagonal", draw): diagonal(model, weights, batches, draw) for draw in range(DRAWS)}
    blocks |= {("ekfac", draw): ekfac(model, weights, batches, draw) for draw in range(DRAWS)}
    blocks["ekfac, empirical", 0] = ekfac(model, weights, batches)
    blocks[SHOWN[0], 0] = ekfac(model, weights, [*batches] * MANY, 0)
    for (name, damping), draw in COLUMNS:
        if name == "flat":
            yield raw
        elif name == "pairs":
            yield [divided(here, pairs, damping) for pairs in zip(*here.answers, strict=True)]
        else:
            yield [blocks[name, draw].solve(gradient, damping) for gradient in raw]


def divided(
    here: ProcessGroup, pairs: tuple[Sequence[Encoded], Sequence[Encoded]], damping: float
) -> Direction:
    """By the curvature of the pairs themselves."""
    named: dict[str, Any] = {"model": "-", "pool": ("-",), "target": ("-",), "out": "-"}
    config = ScoreConfig(**named, curvature="pairs", damping=f"{damping}", batch_tokens=4096)
    encoded = EncodedPairs(*pairs)
    products = products_of(config, here.model, here.weights, [encoded])
    coefficients = direction_coefficients(way_of(config), products)
    return direction_by_products(config, here.model, here.weights, encoded, coefficients)


def scores(here: ProcessGroup, run: str) -> Mapping[str, np.ndarray]:
    """`values[column, row, skill]`, kept in a file."""
    file = WORK / f"{run.replace(' ', '-')}.npz"
    if not file.exists():
        here.retrained(range(ROWS), RUNS[run], 0)
        plan = plan_batches([len(row.tokens) for row in here.rows], 8192)
        batches = [collate([here.rows[i] for i in batch]) for batch in plan]
        solved = list(directions(here, batches))
        engine = reverse(here.model, here.weights, [one for way in solved for one in way])
        found = np.zeros((ROWS, len(COLUMNS) * len(here.targets)))
        for rows, batch in zip(plan, batches, strict=True):
            found[rows] = engine(batch).values.numpy()
        values = found.reshape(ROWS, len(COLUMNS), -1).swapaxes(0, 1)
        np.savez(file, values=values)
    return dict(np.load(file))


def peers(here: ProcessGroup, run: str) -> Mapping[str, np.ndarray]:
    """[draw, row, skill] for each way of kronfluence and bergson, from their own environment; kept
    in a file."""
    folder = WORK / f"{run.replace(' ', '-')}-peers"
    if not (folder / "scores.json").exists():
        here.retrained(range(ROWS), RUNS[run], 0)
        network: Any = here.model.network
        for part in (network, here.tokenizer):
            part.save_pretrained(folder)
        every = (here.rows, *([row for each in side for row in each] for side in here.answers))
        plain = [[(list(row.tokens), list(row.supervised)) for row in rows] for rows in every]
        given: dict[str, Any] = dict(zip(("rows", "chosen", "rejected"), plain, strict=True))
        given |= {"weights": here.gaps().sigmoid().tolist(), "draws": DRAWS}
        (folder / "rows.json").write_text(json.dumps(given), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": ""}
        subprocess.run(
            [str(PYTHON), str(HERE / "lds_peers.py"), str(folder)], check=True, env=environment
        )
    told = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return {name: np.array(values) for name, values in told.items()}


def mean_rank_correlation(foretold: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """[column]: Spearman's ρ over halves, of [column, half, skill] with [half, skill], mean over
    skills."""
    a, b = rankdata(foretold, axis=1), rankdata(gains, axis=0)
    a, b = a - a.mean(1, keepdims=True), b - b.mean(0)
    return np.asarray(((a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(0))).mean(1))


def title(way: Way) -> str:
    return way[0] + (f", damping {way[1]}" if way[1] else "")


def study(here: ProcessGroup, run: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    gains, scored, theirs = retrainings(here, run), scores(here, run), peers(here, run)
    titles = np.array(
        [title(way) for way, _ in COLUMNS] + [name for name, draws in theirs.items() for _ in draws]
    )
    names = list(dict.fromkeys(titles.tolist()))
    mean = np.array(
        [(titles == name) / (titles == name).sum() for name in names]
    )  # over the draws of each way
    values = np.concatenate([scored["values"], *theirs.values()])
    foretold = np.einsum("hr,crs->chs", halves(ROWS, HALVES, 0).astype(float), values)
    each = mean_rank_correlation(foretold, gains[0])
    lds, draw = mean @ each, np.random.default_rng(0)
    picks = [draw.integers(HALVES, size=HALVES) for _ in range(1000)]
    drawn = np.array(
        [mean @ mean_rank_correlation(foretold[:, pick], gains[0, pick]) for pick in picks]
    )
    repeat = float(mean_rank_correlation(gains[1:, :TWICE], gains[0, :TWICE])[0])
    figures = [
        figure(f"rank correlation of J between two orders of the rows, {run}", repeat, "ρ", "≥ 0.9")
    ]

    def more(way: str, than: str, wanted: str) -> None:
        a, b = names.index(way), names.index(than)
        line, apart = f"LDS, {way}, more than {than}, {run}", ends(drawn[:, a] - drawn[:, b])
        figures.append(figure(line, float(lds[a] - lds[b]), "ρ", wanted, apart))

    by_skill = [
        mean @ mean_rank_correlation(foretold[..., [s]], gains[0][:, [s]])
        for s in range(len(here.targets))
    ]
    rows = []
    for place, name in enumerate(names):
        figures.append(
            figure(f"LDS, {name}, {run}", float(lds[place]), "ρ", "", ends(drawn[:, place]))
        )
        if place:
            more(name, "flat", "≥ 0" if name in map(title, WANTED) else "")
        if name in theirs:
            more(title(BEST), name, "≥ 0" if "ekfac" in name else "")
            more(title(SHOWN), name, "")
        told = {
            "of each skill": [float(skill[place]) for skill in by_skill],
        }
        told["of each draw"] = each[titles == name].tolist()
        rows.append({"run": run, "way": name, "lds": float(lds[place]), **told})
    return rows, figures


def ends(drawn: np.ndarray) -> list[float]:
    return [float(end) for end in np.quantile(drawn, (0.025, 0.975))]


def main() -> None:
    torch.set_num_threads(1)
    here = ProcessGroup()
    parts = [study(here, run) for run in RUNS]
    write(
        "lds.json",
        [row for rows, _ in parts for row in rows],
        [line for _, lines in parts for line in lines],
    )


if __name__ == "__main__":
    main()
