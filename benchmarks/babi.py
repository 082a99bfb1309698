"""bAbI (arXiv 1502.05698): a Llama of 0.14 million numbers that has read six tasks halfway, and
three scenarios on it.

    babi-select    pool: right answers to all six tasks        target: pairs of qa20
    babi-repair    pool: four tasks, a quarter answered wrong  target: pairs of these tasks
    babi-choice    pool: right answers to all six tasks        target: qa4 with three choices
    babi-select-kinds, babi-choice-kinds    the same, with a target for each wanted answer: `KINDS`

    python benchmarks/babi.py --data DIR     makes all files, and prints how training moves the
                                             validation pairs

The model reads 1,100 rows of a task, 32 at a time, for two minutes on one core, and stops long
before it is done. Of qa4 and qa20, it reads 60% with a wrong answer: habits that the right rows can
undo. A wrong answer is the place that is asked about (qa4), or the next in the alphabet of what
such questions are answered with, from the story itself where it tells of another. Wrong rows of a
pool and of what was read, and rejected answers, follow this one rule.

Choices made here: hold-out pairs come from the test files, all others from the train files; no
prompt is in two of what was read, pool, target, validation and hold-out; prompts that train and
test share (qa4, qa20) are dropped from train; rows of more than 70 words are left out, which
shortens qa7 only. The loss counts the story a little, since without it the model needs longer to
find the words that matter. A first model, which read only 40 rows of qa20 and no wrong answers,
learned too little in so few steps (60% of the pairs won before, 47% to 67% after everything), and
was dropped. Steps, rate and `full` were set by what `main` prints, on random rows and on
everything, before any run of PRISM; the hold-out took no part. Of four schedules of 40 steps, two
moved the validation pairs: all weights at 1e-3 (select, everything: 0.55 won before, 0.62 and 0.73
after) and LoRA at 3e-3 (0.65 and 0.68); 80 steps of LoRA move more (0.75 and 0.77) but are twice as
many. All weights were taken, as the plainer of the two. J rises with the spread of the gaps too:
read it with the win rate. `KINDS` was found by attempts.py on the validation pairs."""

import argparse
import json
import random
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scenario import Scenario
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prism_select.data.encoding import Encoder
from prism_select.data.pool import Pool
from prism_select.data.records import Example
from prism_select.data.targets import read_target
from prism_select.demo.train import IGNORED, Encoded, encode
from prism_select.directions.pair_encoding import as_side, encode_sides
from prism_select.evaluation.retraining import Point, Retrainer, TrainingJob, mean_logliks_of
from prism_select.models.loading import LoadedModel, load
from prism_select.models.lora_training import TrainingSettings
from prism_select.run.folder import Store

Row = dict[str, Any]
TASKS = ("qa1", "qa4", "qa7", "qa15", "qa16", "qa20")
PARTS = {
    "read": 1100,
    "pool": 300,
    "target": 60,
    "validation": 60,
}  # rows of each task's train file
HABITS, HABIT = (
    ("qa4", "qa20"),
    0.6,
)  # the share of their rows that the model read with a wrong answer
LONGEST = 70  # words of a prompt
STEPS, BATCH, RATE, STORY = 1100, 32, 3e-3, 0.3
BAD = 0.25
COUNTS: Mapping[str, Mapping[str, int]] = {  # of a task, in each part
    "select": {"target": 50, "validation": 60, "holdout": 100},
    "repair": {"target": 15, "validation": 25, "holdout": 25},
    "choice": {"target": 30, "validation": 50, "holdout": 60},
}
SCORING: Mapping[str, Any] = {"layers": "all", "dtype": "float32", "max_length": 128}
KINDS: Mapping[str, Any] = {"combine": "round-robin", "curvature": "ekfac"}
TRAINING: Mapping[str, Any] = {"seeds": 10, "steps": 40, "rate": 1e-3, "full": True}

START, ANSWER, END, PAD, UNKNOWN = "<s>", "<answer>", "</s>", "<pad>", "<unk>"
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
{%- else %}{{- message['content'] + '<answer>' }}{%- endif %}
{%- endfor %}
"""


@dataclass(frozen=True)
class Task:
    """Rows of each part, without a prompt in common, and what else a question could have been
    answered with."""

    name: str
    parts: Mapping[str, Sequence[Row]]

    def answers(self, row: Row) -> list[str]:
        """All that such a question is answered with; of these, those in the row's own story, if any
        other is there."""
        kind = asks(row)
        known = sorted(
            {
                other["answer"]
                for rows in self.parts.values()
                for other in rows
                if asks(other) == kind
            }
        )
        told = set(row["prompt"].lower().replace(".", " ").split()) | {row["answer"]}
        near = [answer for answer in known if answer in told]
        return near if len(near) > 1 else known

    def wrong(self, row: Row) -> str:
        """The place that is asked about, if there is one; else the next answer in the alphabet, in
        a circle."""
        others = [answer for answer in self.answers(row) if answer != row["answer"]]
        asked = [answer for answer in others if answer in question(row)]
        return str((asked or [answer for answer in others if answer > row["answer"]] or others)[0])

    def pairs(self, part: str, count: int) -> list[Row]:
        rows = self.parts[part][:count]
        return [
            {"prompt": r["prompt"], "chosen": r["answer"], "rejected": self.wrong(r)} for r in rows
        ]

    def quiz(self, part: str, count: int) -> list[Row]:
        draw, made = random.Random(f"{self.name} {part}"), []
        for row in self.parts[part][:count]:
            choices = self.answers(row)
            draw.shuffle(choices)
            asked = {
                "question": row["prompt"],
                "choices": choices,
                "answer": choices.index(row["answer"]),
            }
            made.append({**asked, "wanted": row["answer"]})
        return made


def question(row: Row) -> str:
    return str(row["prompt"].rsplit(". ", 1)[-1])


def asks(row: Row) -> str:
    """The first word of the question, which tells places from reasons in qa20."""
    return question(row).split()[0]


def task(data: Path, name: str) -> Task:
    every = {}
    for split in ("test", "train"):
        lines = (data / "babi" / f"{name}_{split}.jsonl").read_text(encoding="utf-8").splitlines()
        every[split] = {
            row["prompt"]: row
            for row in map(json.loads, lines)
            if len(row["prompt"].split()) <= LONGEST
        }
    rows = [row for prompt, row in every["train"].items() if prompt not in every["test"]]
    random.Random(name).shuffle(rows)
    parts, start = dict[str, list[Row]](), 0
    for part, count in PARTS.items():
        parts[part], start = rows[start : start + count], start + count
    return Task(name, parts | {"holdout": list(every["test"].values())})


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A token for each word, in small letters, and for each mark."""
    split, lower = pre_tokenizers.Whitespace(), normalizers.Lowercase()
    special = [PAD, START, ANSWER, END, UNKNOWN]
    words = sorted(
        {word for text in texts for word, _ in split.pre_tokenize_str(lower.normalize_str(text))}
    )
    whole = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token=UNKNOWN)
    )
    whole.normalizer, whole.pre_tokenizer = lower, split
    roles = {"bos_token": START, "eos_token": END, "pad_token": PAD, "unk_token": UNKNOWN}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, extra_special_tokens=[ANSWER], **roles
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tasks: Mapping[str, Task], folder: Path) -> None:
    """Where the folder is there already, nothing is done."""
    if folder.exists():
        return
    rows = [
        (
            row["prompt"],
            t.wrong(row)
            if t.name in HABITS and place < HABIT * len(t.parts["read"])
            else row["answer"],
        )
        for t in tasks.values()
        for place, row in enumerate(t.parts["read"])
    ]
    tokenizer = make_tokenizer(
        f"{r['prompt']} {r['answer']}" for t in tasks.values() for p in t.parts.values() for r in p
    )
    torch.manual_seed(0)
    size = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    tokens = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **size, **tokens)
    )
    read(
        model,
        [encode(tokenizer, {"prompt": prompt, "completion": answer}) for prompt, answer in rows],
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent))
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    draft.replace(folder)


def read(model: LlamaForCausalLM, rows: Sequence[Encoded]) -> None:
    """Rows of like length stand together, which halves the padding; the rate falls to zero over the
    second half."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 1.0, 2 * (STEPS - step) / STEPS)
    )
    draw, batches = random.Random(0), list[list[Encoded]]()
    for _ in range(STEPS):
        if not batches:
            order = sorted(draw.sample(rows, len(rows)), key=lambda row: len(row[0]))
            batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
            draw.shuffle(batches)
        loss = reading_loss(model, batches.pop())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def reading_loss(model: LlamaForCausalLM, batch: Sequence[Encoded]) -> torch.Tensor:
    """Nats per answer, and `STORY` times nats per word of the story."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in batch])
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    words, answers = ids[:, 1:].flatten(), labels[:, 1:].flatten()
    story = words.masked_fill((answers != IGNORED) | (words == 0), IGNORED)
    return 2 * cross_entropy(logits, answers) + STORY * cross_entropy(logits, story)


def pool_rows(tasks: Iterable[Task], count: int, wanted: str) -> list[Row]:
    """Right answers; `is_wanted` is true on those to one task."""
    made = [
        {
            "prompt": r["prompt"],
            "completion": r["answer"],
            "source": t.name,
            "is_wanted": t.name == wanted,
        }
        for t in tasks
        for r in t.parts["pool"][:count]
    ]
    random.Random(wanted).shuffle(made)
    return made


def mixed_rows(tasks: Iterable[Task], count: int) -> list[Row]:
    """Right and wrong answers; `is_bad` is true on the wrong ones."""
    draw, made = random.Random("bad"), list[Row]()
    for t in tasks:
        for place, r in enumerate(t.parts["pool"][:count]):
            bad = place < BAD * count
            answer = t.wrong(r) if bad else r["answer"]
            made.append(
                {"prompt": r["prompt"], "completion": answer, "source": t.name, "is_bad": bad}
            )
    draw.shuffle(made)
    return made


def scenarios(data: Path, work: Path) -> list[Scenario]:
    """Files and model are written under `work`; the model once."""
    tasks = {name: task(data, name) for name in TASKS}
    folder = work / "babi-model"
    make_model(tasks, folder)
    known = [t for t in tasks.values() if t.name not in HABITS]
    mixed = {
        part: [pair for t in known for pair in t.pairs(part, n)]
        for part, n in COUNTS["repair"].items()
    }
    single = {part: tasks["qa20"].pairs(part, n) for part, n in COUNTS["select"].items()}
    quiz = {part: tasks["qa4"].quiz(part, n) for part, n in COUNTS["choice"].items()}
    made = []
    for name, pool, pairs in (
        ("select", pool_rows(tasks.values(), 250, "qa20"), single),
        ("repair", mixed_rows(known, 300), mixed),
        ("choice", pool_rows(tasks.values(), 250, "qa4"), quiz),
    ):
        files = {
            part: save(work / f"babi-{name}-{part}.jsonl", rows)
            for part, rows in {"pool": pool, **pairs}.items()
        }
        repair = name == "repair"
        truth = "is_bad" if repair else "is_wanted"
        told = {part: files[part] for part in ("pool", "target", "holdout")}
        made.append(
            Scenario(
                f"babi-{name}",
                "repair" if repair else "select",
                folder,
                **told,
                truth=truth,
                scoring=SCORING,
                training=TRAINING,
            )
        )
    return made


def by_kind(scenarios: Sequence[Scenario]) -> list[Scenario]:
    """Both selections again, with a target for each answer that is wanted."""
    columns = {"babi-select": "chosen", "babi-choice": "wanted"}
    return [
        replace(
            each,
            name=f"{each.name}-kinds",
            scoring={**SCORING, **KINDS, "target_by": columns[each.name]},
        )
        for each in scenarios
        if each.name in columns
    ]


def save(path: Path, rows: Iterable[Row]) -> str:
    """A file that is so already is left as it is: another study may be reading it."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return str(path)


def reaction(scenario: Scenario, courses: Sequence[TrainingSettings]) -> None:
    """Prints gain and win rate on the validation pairs, before and after training on 75 random
    rows, or on all."""
    model, tokenizer = load(str(scenario.model), "float32", torch.device("cpu"))
    encoder = Encoder(tokenizer, "auto", 128)
    rows = [
        encoder.encode(row)
        for _, row in Pool([scenario.pool], {}).rows()
        if isinstance(row, Example)
    ]
    pairs = read_target(scenario.holdout.replace("holdout", "validation"), {})
    sides = [as_side(side, 8192, model.device) for side in encode_sides(pairs, encoder)]
    before = Point(0, 0.0, *mean_logliks_of(model, sides))
    print(f"{scenario.name}: {in_words(before)} before, {len(rows)} rows, {len(pairs)} pairs")
    loaded = LoadedModel(model, encoder)
    retrainer = Retrainer(loaded, dict(enumerate(rows)), sides, Store(""), ())
    for course in courses:
        few = random.Random(course.seed).sample(range(len(rows)), 75)
        after = [
            in_words(retrainer.train(TrainingJob("", np.array(some), course))[-1])
            for some in (few, range(len(rows)))
        ]
        print(f"  {course}: {after[0]} after random rows, {after[1]} after everything", flush=True)


def in_words(point: Point) -> str:
    wins = (point.gap > 0).mean()
    return f"gain {point.gain.mean():.2f}, gap {point.gap.mean():.2f}, wins {wins:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # PEFT asks transformers for a name that is about to change
    torch.set_num_threads(1)
    tries = [
        (40, 3e-4, True),
        (40, 1e-3, True),
        (40, 1e-3, False),
        (40, 3e-3, False),
        (80, 3e-3, False),
    ]
    courses = [TrainingSettings(seed, *each) for each in tries for seed in (0, 1)]
    for scenario in scenarios(parser.parse_args().data, Path(__file__).parent / "work" / "babi"):
        reaction(scenario, courses)


if __name__ == "__main__":
    main()
