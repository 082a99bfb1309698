"""Configuration: one frozen dataclass is the flags of a command, its TOML file and a row of the manifest.

    prism score --layers late …   =   ScoreConfig(layers="late", …)   =   config.toml: layers = "late"

Choices made here: a field is an option of the same name with dashes for underscores, its annotation is the help text,
and its default is said nowhere else. Values are checked when a config is made, before anything is read.
`MENDABLE` options may change between a run and its resumption; a change in any other is refused by name.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from prism_select.run.errors import BadOption
from prism_select.run.options import Amount, Options, parse_number, parse_share

__all__ = [
    "MENDABLE",
    "OF_CHOICE",
    "ROW_BYTES",
    "ModelConfig",
    "RepairConfig",
    "ScoreConfig",
    "SelectConfig",
    "sides_of",
]

SETTLED = frozenset(  # what a saved direction has in it
    {
        "anchor",
        "combine",
        "common",
        "curvature",
        "curvature_from",
        "damping",
        "layers",
        "nearest",
        "target_by",
    }
    | {"save_curvature", "uncertainty", "warmup", "weighting"}
)


OF_CHOICE = frozenset(  # what a choice from scores that are there goes by
    {
        "budget",
        "combine",
        "near_duplicates",
        "normalize",
        "out",
        "overwrite",
        "per_source",
        "rank_by",
        "seed",
    }
    | {"select_from"}
)


MENDABLE = frozenset(
    {"out", "overwrite", "dry_run", "bad_rows", "max_bad", "device", "batch_tokens"}
    | {"runtime", "actors", "actor_resources", "ray_address"}
)


ROW_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Options):
    """What it takes to load a model and read pairs with it."""

    model: Annotated[
        str, "Folder of a causal language model (safetensors, or one .gguf file), or a hub id."
    ] = ""
    adapter: Annotated[
        str,
        "Folder of a PEFT adapter to put on the model: merged, or with --layers adapter kept apart to be counted.",
    ] = ""
    out: Annotated[str, "Where to write."] = ""
    weighting: Annotated[
        Literal["prism", "uniform", "hard", "unpaired"],
        "How pairs count: prism weighs each by the model's present preference (arXiv 2605.21422).",
    ] = "prism"
    layers: Annotated[
        str,
        "Weights that count: all, late (upper half of the blocks), last:N, adapter, or a regular expression.",
    ] = "all"
    anchor: Annotated[
        float,
        "Add this many times the mean log-likelihood of the answers that are aimed at (the chosen ones; in repair, the "
        "rejected ones) to the gain; 0: nothing.",
    ] = 0.0
    common: Annotated[
        Literal["keep", "remove"],
        "What both answers of the pairs share: keep it in the direction, or take it out.",
    ] = "keep"
    nearest: Annotated[
        str,
        "Take only this share of the pairs of each target: those whose two answers are most alike, letter by letter.",
    ] = "100%"
    skip_end: Annotated[
        bool, "Leave end-of-turn tokens out, of pairs and of rows, for models that never stop."
    ] = False
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"],
        "Precision of the model; auto is that of its files (float32 for float16 files on a CPU).",
    ] = "auto"
    device: Annotated[str, "cpu, cuda or cuda:1; auto takes a GPU when there is one."] = "auto"
    batch_tokens: Annotated[
        int,
        "Tokens in a batch, padding included; 0: 4,096, and on a CPU 512, or 2,048 where no graph is kept.",
    ] = 0
    max_length: Annotated[
        int, "Rows of more tokens than this, or than the model takes, are cut and marked truncated."
    ] = 2048
    template: Annotated[
        Literal["auto", "chat", "plain"],
        "How turns become text: the tokenizer's chat template, or as they are; auto is chat where there is one.",
    ] = "auto"
    fields: Annotated[str, "Names of columns, as in prompt=question,completion=response."] = ""
    bad_rows: Annotated[
        Literal["quarantine", "stop"], "What a bad row does: it is set aside, or it stops."
    ] = "quarantine"
    max_bad: Annotated[str, "More bad rows than this share stop the run."] = "1%"
    max_row_bytes: Annotated[int, "A row of more bytes is bad, and is never held in memory."] = (
        ROW_BYTES
    )
    seed: Annotated[int, "Of everything that is drawn."] = 0
    overwrite: Annotated[bool, "Start afresh where something is already there."] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_tokens", "max_length"):
            value = getattr(self, name)
            if value < 2 and (name, value) != ("batch_tokens", 0):
                raise BadOption(f"--{name.replace('_', '-')} {value}: must be at least 2")
        if not 2**10 <= self.max_row_bytes <= 2**30:
            raise BadOption(
                f"--max-row-bytes {self.max_row_bytes}: must be between {2**10} and {2**30}"
            )
        if not 0 <= self.allowed_bad <= 1:
            raise BadOption(f"--max-bad {self.max_bad}: not a share; try 1%")
        if not 0 < parse_share(self.nearest) <= 1:
            raise BadOption(f"--nearest {self.nearest}: not a share of the pairs; try 50%")
        if not 0 <= self.anchor < math.inf:
            raise BadOption(f"--anchor {self.anchor}: must be 0 or more; try 0.1")
        if self.layers == "adapter" and not self.adapter:
            raise BadOption("--layers adapter: there is none; give its folder with --adapter")
        if self.weighting == "unpaired" and self.common == "remove":
            raise BadOption(
                "--common remove: unpaired answers have nothing in common with others; leave it out"
            )

    def tokens_on(self, device: str, graph: bool = True) -> int:
        """In a batch on such a device: fewer where a graph is kept for a way back."""
        return self.batch_tokens or (4096 if device != "cpu" else 512 if graph else 2048)

    @property
    def allowed_bad(self) -> float:
        """Share of the rows that may be bad; NaN where `max_bad` is no share."""
        return parse_share(self.max_bad)

    @property
    def nearest_share(self) -> float:
        return parse_share(self.nearest)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ModelConfig):
    """Score every row of a pool by how much training on it would raise the gain on the target pairs."""

    command: ClassVar[str] = "score"

    pool: Annotated[
        Sequence[str], "Files, folders or globs of rows to score; repeat the option for more."
    ] = ()
    target: Annotated[
        Sequence[str],
        "File of pairs: chosen is what you want, rejected what you don't; NAME=FILE, repeated, for several targets.",
    ] = ()
    target_by: Annotated[
        str, "Column of the target file: each of its values is a target of its own."
    ] = ""
    combine: Annotated[
        Literal["mean", "max", "round-robin"],
        "Several targets: score by their mean, by the best of them, or take each one's best row in turn.",
    ] = "mean"
    curvature: Annotated[
        Literal["flat", "diagonal", "ekfac", "cg"],
        "What the direction is divided by: nothing, second moments of gradients, their Kronecker-factored form (arXiv "
        "1806.03884), or the Gauss-Newton matrix by conjugate gradients.",
    ] = "flat"
    damping: Annotated[
        str,
        "Share of each weight's mean eigenvalue that is added to it; with several, as in 0.1,1, the first counts.",
    ] = "0.1"
    curvature_rows: Annotated[
        int, "Rows of the pool, drawn at random, that the curvature is fitted on."
    ] = 256
    curvature_labels: Annotated[
        Literal["sampled", "given"],
        "Tokens for the curvature: drawn from the model (the Fisher matrix) or those of the rows (the empirical one).",
    ] = "sampled"
    curvature_from: Annotated[
        str,
        "Take the curvature of this run folder, or Adam's second moments by weight from a .safetensors file.",
    ] = ""
    save_curvature: Annotated[
        bool, "Keep the curvature in the run folder, for --curvature-from; it is large."
    ] = False
    uncertainty: Annotated[
        int,
        "Groups of pairs that are scored one by one, which gives each score a standard error; 0: none.",
    ] = 0
    rank: Annotated[
        int, "Score along a direction of this rank in every matrix, which costs less; 0: as it is."
    ] = 0
    save_adapter: Annotated[
        str,
        "Also write the direction, of length one, to this folder as a PEFT LoRA adapter of rank --rank (or 16).",
    ] = ""
    layer_profile: Annotated[
        str,
        "Tell what each block adds to the scores of a sample of the pool (pool) or of a file of held-out pairs.",
    ] = ""
    tokens: Annotated[bool, "Also write what each supervised token adds to the score."] = False
    engine: Annotated[
        Literal["auto", "reverse", "forward", "difference", "reference"],
        "How scores are computed; auto takes the fastest that reaches every weight, and checks it.",
    ] = "auto"
    normalize: Annotated[
        Literal["none", "tokens", "norm"],
        "Rank by the score (none: summed over tokens, the paper), by the score per token, or by its cosine with the "
        "row's gradient.",
    ] = "none"
    cascade: Annotated[
        bool,
        "Score exactly only where the best rows may be, and guess the rest from the lower blocks; select and repair.",
    ] = False
    recall: Annotated[
        float, "cascade: share of the best rows that must have an exact score, by its own estimate."
    ] = 0.95
    direction: Annotated[str, "Reuse a saved direction.safetensors instead of --target."] = ""
    warmup: Annotated[
        str,
        "Fine-tune a LoRA adapter on this share of the pool first, as in 5%, and score with it merged; empty: no.",
    ] = ""
    runtime: Annotated[
        Literal["local", "ray"],
        "What scores the pool: this process (and those that torchrun started beside it), or actors of Ray (with the "
        "extra [ray]).",
    ] = "local"
    actors: Annotated[int, "Of Ray, each with a model of its own; 0: as many as find room."] = 0
    actor_resources: Annotated[
        str,
        "What an actor takes, in Ray's words, as in GPU=1,CPU=4; empty: a GPU, or where there is none its share of a "
        "machine's processors.",
    ] = ""
    ray_address: Annotated[
        str,
        "Ray cluster to use: host:port of its head, or auto for the one of this machine; empty: one for this run.",
    ] = ""
    dry_run: Annotated[bool, "Print the plan (tokens, time, memory, disk) and stop."] = False

    @property
    def first_engine(self) -> str:
        """The one that is asked for, or that auto tries first."""
        return "reverse" if self.engine == "auto" else self.engine

    def __post_init__(self) -> None:
        for name in ("pool", "target"):
            given: Any = getattr(self, name)
            one = isinstance(given, str | Path)
            object.__setattr__(
                self, name, (str(given),) * bool(str(given)) if one else tuple(map(str, given))
            )
        super().__post_init__()
        self._check_needs()
        self._check_curvature()
        self._check_ranking()
        self._check_cascade()
        self._check_actors()

    def _check_needs(self) -> None:
        needed = {"model": self.model, "pool": self.pool, "out": self.out or self.dry_run}
        for name, value in needed.items():
            if not value:
                raise BadOption(
                    f"--{name} is missing; prism {self.command} --help shows what a run needs"
                )
        if bool(self.target) == bool(self.direction):
            raise BadOption(
                "give either --target PAIRS or --direction FILE"
                + (", not both" if self.target else "")
            )
        if self.warmup and Amount.parse("--warmup", self.warmup).kind != "share":
            raise BadOption(f"--warmup {self.warmup}: not a share of the pool; try 5%")
        if self.warmup and self.adapter:
            raise BadOption(
                "--warmup makes an adapter of its own: leave out --adapter, or save the model merged"
            )
        if self.direction and (settled := sorted(SETTLED.intersection(self.given))):
            option = settled[0].replace("_", "-")
            raise BadOption(
                f"--{option}: a saved direction has that in it; leave it out, or give --target"
            )

    @property
    def given(self) -> list[str]:
        """The options that are not at their defaults."""
        return [f.name for f in fields(self) if getattr(self, f.name) != f.default]

    def _check_curvature(self) -> None:
        if self.curvature_from and self.curvature in ("flat", "cg"):
            raise BadOption("--curvature-from: say which it is with --curvature, diagonal or ekfac")
        if self.save_curvature and self.curvature in ("flat", "cg"):
            raise BadOption(
                f"--save-curvature: {self.curvature} keeps nothing; take diagonal or ekfac"
            )
        if self.curvature_rows < 1:
            raise BadOption(f"--curvature-rows {self.curvature_rows}: must be at least 1")
        if not self.dampings or not all(0 < value < math.inf for value in self.dampings):
            raise BadOption(
                f"--damping {self.damping}: not one or several numbers above 0; try 0.1 or 0.1,1"
            )
        others = [f"{value:g}" for value in self.dampings[1:]]
        if len(set(others)) < len(others):
            raise BadOption(f"--damping {self.damping}: the same value twice; leave one out")
        if len(self.dampings) > 1 and self.curvature == "flat":
            raise BadOption(f"--damping {self.damping}: flat has none to compare; give --curvature")

    def _check_ranking(self) -> None:
        if self.rank < 0:
            raise BadOption(f"--rank {self.rank}: must be at least 1, or 0 for the whole direction")
        if self.save_adapter and self.layers == "adapter":
            raise BadOption(
                "--save-adapter: the direction of an adapter's own weights is no adapter; count others"
            )
        if self.uncertainty and self.uncertainty < 4:
            raise BadOption(f"--uncertainty {self.uncertainty}: at least 4 groups, or 0 for none")
        if self.combine == "round-robin" and "positive" in (
            getattr(self, "budget", ""),
            getattr(self, "remove", ""),
        ):
            raise BadOption(
                "--combine round-robin takes rows in turn and knows no positive ones; give a share"
            )
        if self.combine != "mean" and (self.uncertainty or len(self.dampings) > 1):
            option = "--uncertainty" if self.uncertainty else "several values of --damping"
            raise BadOption(f"{option}: only with --combine mean")
        if self.tokens and self.engine in ("reverse", "reference"):
            raise BadOption(
                f"--tokens: engine {self.engine} does not tell tokens apart; try --engine forward"
            )
        if self.normalize == "norm" and self.engine not in ("auto", "reverse"):
            raise BadOption(
                f"--normalize norm: engine {self.engine} has no norms of gradients; try --engine reverse"
            )
        if self.normalize == "norm" and self.tokens:
            raise BadOption("--normalize norm and --tokens: no engine does both; leave one out")

    def _check_cascade(self) -> None:
        if not 0.5 <= self.recall < 1:
            raise BadOption(f"--recall {self.recall}: must be at least 0.5 and below 1; try 0.95")
        if not self.cascade:
            return
        if self.command == "score":
            raise BadOption(
                "--cascade: looks for the best rows of a budget, and score has none; take select or repair"
            )
        if "positive" in (getattr(self, "budget", ""), getattr(self, "remove", "")):
            raise BadOption(
                "--cascade: guesses have no sure sign; give the budget as a share, 5% say"
            )
        no = {
            "--tokens": self.tokens,
            "--uncertainty": bool(self.uncertainty),
            "--normalize norm": self.normalize == "norm",
            f"--combine {self.combine}": self.combine != "mean",
            "--rank-by": bool(getattr(self, "rank_by", "")),
            "several values of --damping": len(self.dampings) > 1,
        }
        for option, given in no.items():
            if given:
                raise BadOption(
                    f"--cascade and {option}: takes an exact score of every row; leave one out"
                )

    def _check_actors(self) -> None:
        if self.actors < 0:
            raise BadOption(
                f"--actors {self.actors}: must be at least 1, or 0 for as many as find room"
            )
        given = [
            name for name in ("actors", "actor_resources", "ray_address") if getattr(self, name)
        ]
        if given and self.runtime != "ray":
            raise BadOption(
                f"--{given[0].replace('_', '-')}: only Ray has actors; give --runtime ray, or leave it out"
            )
        if self.actor_resources and not all(value > 0 for value in self.resources.values() or [0]):
            raise BadOption(
                f"--actor-resources {self.actor_resources}: not NAME=NUMBER above 0; try GPU=1,CPU=4"
            )

    @property
    def resources(self) -> Mapping[str, float]:
        """What an actor takes, by name; NaN for what is no number."""
        parts = (part.partition("=") for part in self.actor_resources.split(",") if part.strip())
        return {name.strip(): parse_number(value) for name, _, value in parts}

    @property
    def dampings(self) -> tuple[float, ...]:
        """The first is the one that counts; none where `damping` is no list of numbers."""
        try:
            return tuple(float(part) for part in self.damping.split(","))
        except ValueError:
            return ()

    @property
    def ranking(self) -> str:
        """The column of scores.parquet that the choice is made by."""
        return {"tokens": "score_per_token", "norm": "score_cosine"}.get(self.normalize, "score")


@dataclass(frozen=True, kw_only=True)
class SelectConfig(ScoreConfig):
    """Choose the part of a pool that is worth training on: the highest scores under a budget."""

    command: ClassVar[str] = "select"

    budget: Annotated[
        str, "How much to choose: 5%, 500 (rows), 200000tok (supervised tokens) or positive."
    ] = "5%"
    per_source: Annotated[
        str, "Most that one source may take of the budget, as in 30%; empty: no cap."
    ] = ""
    near_duplicates: Annotated[
        float,
        "MinHash similarity (0 to 1) from which on only the best-scored row stays; 0: rows are not compared.",
    ] = 0.0
    rank_by: Annotated[
        Literal[
            "",
            "random",
            "random-by-source",
            "length",
            "bm25",
            "loss-top",
            "loss-mid",
            "ifd",
            "rds",
            "less",
            "uniform",
            "hard",
            "unpaired",
            "contrast",
        ],
        "Choose by a rival's ranking in place of the score, which is taken all the same; with --select-from only "
        "random, random-by-source and length.",
    ] = ""
    select_from: Annotated[
        str, "Choose again from the scores of this run folder, without a model."
    ] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        Amount.parse("--budget", self.budget)
        if self.per_source and Amount.parse("--per-source", self.per_source).kind != "share":
            raise BadOption(f"--per-source {self.per_source}: not a share of the budget; try 30%")
        if self.rank_by and "positive" in self.budget:
            raise BadOption(
                f"--rank-by {self.rank_by}: only scores have a sign; give --budget as a share, 5% say"
            )
        if not 0 <= self.near_duplicates <= 1:
            raise BadOption(
                f"--near-duplicates {self.near_duplicates}: not between 0 and 1; try 0.8"
            )

    def _check_needs(self) -> None:
        if not self.select_from:
            return super()._check_needs()
        if self.dry_run:
            raise BadOption("--select-from takes seconds and has no plan: leave out --dry-run")
        if others := [
            f"--{name.replace('_', '-')}" for name in self.given if name not in OF_CHOICE
        ]:
            raise BadOption(
                f"--select-from takes scores as they are: leave out {', '.join(others)}"
            )
        if not self.out:
            raise BadOption("--out is missing: the folder for the new choice")


@dataclass(frozen=True, kw_only=True)
class RepairConfig(ScoreConfig):
    """Remove the rows that push a model the wrong way: towards the rejected answers of the pairs."""

    command: ClassVar[str] = "repair"

    remove: Annotated[
        str, "How much to remove: 10%, 500 (rows), 200000tok or positive (every harmful row)."
    ] = "10%"
    label_field: Annotated[
        str, "Column that is true on bad rows; prints how well the ranking finds them."
    ] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        Amount.parse("--remove", self.remove)


def sides_of(swapped: bool) -> tuple[str, str]:
    """What the target file calls the answers that are aimed at and the others; `repair` swaps them."""
    return ("rejected", "chosen") if swapped else ("chosen", "rejected")
