"""Configuration: the options of a run in sections, each a frozen dataclass that functions take.

    ModelOptions       the model, and how rows become tokens     RowOptions      columns, bad rows
    DirectionOptions   how pairs become a gradient               TargetOptions   which pairs
    CurvatureOptions   the Hessian approximation                 ScoringOptions  engine, ranking
    RuntimeOptions     processes, plan                           FolderOptions   where to write
    OutputOptions      files of chosen rows

    ScoreConfig = all of them     SelectConfig, RepairConfig = ScoreConfig + how rows are chosen

    prism score --layers late …  =  ScoreConfig(layers="late", …)  =  config.toml: layers = "late"

Choices made here:
- a command's config inherits from its sections, so it is flat on the command line and in
  config.toml; a function with a section as parameter can read nothing else;
- a section checks its own values in `validate`, before anything is read.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, ClassVar, Literal, get_args

from prism_select.run.adapter_base import base_of_adapter
from prism_select.run.errors import BadOption
from prism_select.run.options import (
    Amount,
    Mark,
    Options,
    flag_of,
    marked,
    options_of,
    parse_number,
    parse_share,
    split_names,
)

__all__ = [
    "BATCH_TOKENS",
    "BESIDE_PAIRS",
    "OF_POOL",
    "TUNABLE",
    "CountRanking",
    "CurvatureOptions",
    "DirectionOptions",
    "FolderOptions",
    "ModelOptions",
    "OutputOptions",
    "Ranking",
    "RepairConfig",
    "RowOptions",
    "RuntimeOptions",
    "ScoreConfig",
    "ScoringOptions",
    "SelectConfig",
    "TargetOptions",
    "keeping_given",
]

BATCH_TOKENS = {"gpu": 4096, "cpu": 512, "cpu without a graph": 2048}
LARGE = {"gpu": 2**32, "cpu": 2**28}  # numbers of a model
CountRanking = Literal["random", "random-by-source", "length"]  # baselines that read no text
Ranking = Literal[
    CountRanking,
    "bm25",
    "loss-top",
    "loss-mid",
    "ifd",
    "rds",
    "less",
    "probe",
    "vector-filter",
    "projection-difference",
    "concept-influence",
    "probe-and-score",
    "first-order",
    "uniform",
    "hard",
    "unpaired",
    "contrast",
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """The model, and how its tokenizer reads rows."""

    group: ClassVar[str] = "Input"

    model: Annotated[
        str | None,
        "Folder of a causal language model (safetensors, or one .gguf file), or a hub id; the "
        "folder of a PEFT adapter stands for its base and itself.",
        Mark.REQUIRED | Mark.PATH,
    ] = None
    adapter: Annotated[
        str | None,
        "Folder of a PEFT adapter to put on the model, with its tokenizer and embeddings: merged "
        "where that changes nothing, or with --layers adapter kept apart.",
        Mark.PATH,
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"],
        "Precision of the model; auto is that of its files (float32 for float16 files on a CPU).",
    ] = "auto"
    device: Annotated[
        str, "cpu, cuda or cuda:1; auto takes a GPU when there is one.", Mark.MENDABLE
    ] = "auto"
    device_map: Annotated[
        Literal["none", "auto"],
        "auto: the layers of one model over all GPUs of this machine, then its processor, with "
        "room for scoring (with the extra [devices]).",
        Mark.MENDABLE,
    ] = "none"
    quantize: Annotated[
        Literal["none", "8bit", "4bit"],
        "Pack the model's matrices in 8 or 4 bits with bitsandbytes (the extra [quantize]); scores "
        "are those of the model that they unpack to.",
    ] = "none"
    template: Annotated[
        Literal["auto", "chat", "plain"],
        "How messages become text: the tokenizer's chat template, or joined as they are; auto is "
        "chat where there is one.",
    ] = "auto"
    max_length: Annotated[
        int, "Rows of more tokens than this, or than the model takes, are truncated."
    ] = 2048
    skip_end: Annotated[
        bool,
        "Do not supervise end-of-turn tokens, of pairs and of rows: for models that never stop.",
        Mark.RARE,
    ] = False
    template_date: Annotated[
        str | None,
        "The day that a chat template takes for today, as in 2026-11-30  [default: the day of the "
        "run's first start].",
        Mark.RARE,
    ] = None
    batch_tokens: Annotated[
        int | None,
        "Tokens in a batch, padding included  [default: 4,096 on a GPU; 512 on a CPU, or 2,048 "
        "where no graph is kept].",
        Mark.MENDABLE | Mark.RARE,
    ] = None

    def normalise(self) -> None:
        """A model that is the folder of an adapter becomes its base, with the adapter."""
        super().normalise()
        if self.model and (base := base_of_adapter(self.model, self.adapter)):
            object.__setattr__(self, "adapter", self.model)
            object.__setattr__(self, "model", base)

    def validate(self) -> None:
        for name in ("batch_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise BadOption(f"{flag_of(name)} {value}: must be at least 2")
        if self.device_map == "auto" and self.device != "auto":
            raise BadOption(
                f"--device {self.device} and --device-map auto: one names a device, the other "
                "takes all; leave one out (CUDA_VISIBLE_DEVICES hides GPUs)"
            )
        if self.quantize != "none" and self.dtype == "float64":
            raise BadOption(
                f"--quantize {self.quantize} and --dtype float64: bitsandbytes packs float32 at "
                "most; leave one out"
            )
        if self.template_date is not None:
            try:
                is_day = date.fromisoformat(self.template_date).isoformat() == self.template_date
            except ValueError:
                is_day = False
            if not is_day:
                raise BadOption(f"--template-date {self.template_date}: no day; try 2026-11-30")

    def tokens_on(self, device: str, numbers: int, graph: bool = True) -> int:
        """Tokens in a batch, of a model of so many numbers; the graph of a backward pass leaves
        room for fewer, a quarter of them where the model is large."""
        kind = "gpu" if device != "cpu" else "cpu" if graph else "cpu without a graph"
        share = 4 if graph and numbers > LARGE[kind] else 1
        return self.batch_tokens or BATCH_TOKENS[kind] // share


@dataclass(frozen=True, kw_only=True)
class RowOptions(Options):
    """The meaning of columns, and the fate of bad rows."""

    group: ClassVar[str] = "Input"

    fields: Annotated[
        str | None, "Names of columns, as in prompt=question,completion=response."
    ] = None
    bad_rows: Annotated[
        Literal["quarantine", "stop"],
        "A bad row goes to quarantine.jsonl, or it stops the run.",
        Mark.MENDABLE,
    ] = "quarantine"
    max_bad: Annotated[
        str, "A larger share of bad rows than this stops the run.", Mark.MENDABLE
    ] = "1%"

    def validate(self) -> None:
        if not 0 <= self.allowed_bad <= 1:
            raise BadOption(f"--max-bad {self.max_bad}: not a share; try 1%")

    @property
    def allowed_bad(self) -> float:
        """The largest accepted share of bad rows."""
        return parse_share(self.max_bad)


TUNABLE = ("layers", "weighting", "curvature", "damping", "common", "normalize")


def keeping_given(
    kind: type[Options], values: Mapping[str, Any], given: Collection[str]
) -> Mapping[str, Any]:
    """The values of a config, where `--tune pairs` names what is left to choose: an option that is
    `given` as its default stays, too."""
    if values.get("tune") != "pairs" or not set(TUNABLE) & set(given):
        return values
    left = [option for option in options_of(kind) if option.name in TUNABLE]
    names = [o.name for o in left if values.get(o.name, o.default) == o.default]
    return {**values, "tune": ",".join(name for name in names if name not in given) or "off"}


@dataclass(frozen=True, kw_only=True)
class DirectionOptions(Options):
    """How pairs become a gradient."""

    group: ClassVar[str] = "Direction"

    weighting: Annotated[
        Literal["prism", "uniform", "hard", "unpaired"],
        "How much each pair counts: prism weighs it by the model's present preference (arXiv "
        "2605.21422); unpaired reads the chosen answer alone, and takes rows without a rejected "
        "one.",
        Mark.IN_DIRECTION,
    ] = "prism"
    likelihood: Annotated[
        Literal["token", "sequence"],
        "What answers of pairs are compared by: the mean log-likelihood of a token, or that of the "
        "whole answer (arXiv 2605.21422).",
        Mark.IN_DIRECTION,
    ] = "token"
    layers: Annotated[
        str,
        "Parameters to differentiate: all, late (upper half of the blocks), last:N, adapter, or a "
        "regular expression over their names.",
        Mark.IN_DIRECTION,
    ] = "all"
    anchor: Annotated[
        float,
        "Add this many times the mean log-likelihood of the target's answers (the chosen ones; in "
        "repair, the rejected ones) to the gain.",
        Mark.IN_DIRECTION | Mark.RARE,
    ] = 0.0
    common: Annotated[
        Literal["keep", "remove"],
        "The gradient that both answers of the pairs share: keep it in the direction, or project "
        "it out.",
        Mark.IN_DIRECTION | Mark.RARE,
    ] = "keep"
    tune: Annotated[
        str,
        "pairs: choose by cross-validation on the pairs what is not given of layers, weighting, "
        "curvature, damping, common and normalize; or the names of some of them, as in "
        "layers,damping.",
        Mark.IN_DIRECTION,
    ] = "off"

    def validate(self) -> None:
        if unknown := [name for name in self._to_tune if name not in TUNABLE]:
            raise BadOption(
                f"--tune {self.tune}: {unknown[0]} is unknown; try pairs, off, or some of "
                f"{', '.join(TUNABLE)}"
            )
        if not 0 <= self.anchor < math.inf:
            raise BadOption(f"--anchor {self.anchor}: must be 0 or more; try 0.1")
        if self.weighting == "unpaired" and self.common == "remove":
            raise BadOption(
                "--common remove: unpaired answers have nothing in common with others; leave it out"
            )

    @property
    def _to_tune(self) -> Sequence[str]:
        named = {"off": (), "pairs": TUNABLE}
        return named.get(self.tune, split_names(self.tune))

    @property
    def tuned(self) -> list[str]:
        """Names of the options to choose by cross-validation: those at their defaults."""
        return [
            option.name
            for option in options_of(type(self))
            if option.name in self._to_tune and getattr(self, option.name) == option.default
        ]


@dataclass(frozen=True, kw_only=True)
class TargetOptions(Options):
    """The pairs, or a saved direction."""

    group: ClassVar[str] = "Target"

    target: Annotated[
        Sequence[str],
        "File of pairs: chosen is what you want, rejected what you don't; NAME=FILE, repeated, for "
        "several targets; -NAME=FILE for what you don't want.",
        Mark.REQUIRED | Mark.PATH,
    ] = ()
    target_by: Annotated[
        str | None,
        "Column of the target file: each of its values is a target of its own.",
        Mark.IN_DIRECTION,
    ] = None
    combine: Annotated[
        Literal["mean", "max", "round-robin", "concave"] | None,
        "Several targets: score by their mean, by the best of them, take each one's best row in "
        "turn, or (concave) the row that adds most where least is reached  [default: mean; "
        "round-robin for --groups].",
        Mark.IN_DIRECTION | Mark.IN_CHOICE,
    ] = None
    direction: Annotated[
        str | None, "Reuse a saved direction.safetensors instead of --target.", Mark.PATH
    ] = None


OF_POOL = ("diagonal", "ekfac")  # curvatures that are taken of rows of the pool
BESIDE_PAIRS = (*OF_POOL, "adam")  # those of which the pairs alone say nothing


@dataclass(frozen=True, kw_only=True)
class CurvatureOptions(Options):
    """The Hessian approximation: its inverse multiplies the gradient."""

    group: ClassVar[str] = "Direction"

    curvature: Annotated[
        Literal["pairs", "flat", "diagonal", "ekfac", "adam"],
        "Hessian approximation to divide the direction by: the second moment of the pairs' own "
        "gradients, none, of the pool second moments of gradients or EK-FAC (arXiv 1806.03884), or "
        "Adam's moments at the checkpoint (LESS, arXiv 2402.04333).",
        Mark.IN_DIRECTION,
    ] = "pairs"
    damping: Annotated[
        str,
        "Share of each layer's mean eigenvalue added to the curvature; with several, as in 0.1,1, "
        "the first counts and the others are compared with it.",
        Mark.IN_DIRECTION,
    ] = "0.1"

    def validate(self) -> None:
        if not self.dampings or not all(0 < value < math.inf for value in self.dampings):
            raise BadOption(
                f"--damping {self.damping}: not one or several numbers above 0; try 0.1 or 0.1,1"
            )
        compared = [f"{value:g}" for value in self.dampings[1:]]
        if len(set(compared)) < len(compared):
            raise BadOption(f"--damping {self.damping}: the same value twice; leave one out")
        if len(self.dampings) > 1 and self.curvature == "flat":
            raise BadOption(f"--damping {self.damping}: flat has none to compare; give --curvature")
        if len(self.dampings) > 1 and self.curvature == "pairs":
            raise BadOption(f"--damping {self.damping}: --curvature pairs takes one value; try 0.1")

    @property
    def dampings(self) -> tuple[float, ...]:
        """The values of `damping`, the one in use first; empty if it is no list of numbers."""
        try:
            return tuple(float(text) for text in self.damping.split(","))
        except ValueError:
            return ()


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(Options):
    """How rows are scored along the direction, and how they are ranked."""

    group: ClassVar[str] = "Scoring"

    engine: Annotated[
        Literal["auto", "reverse", "forward", "difference", "reference"],
        "How scores are computed; auto takes the fastest that reaches every parameter, and checks "
        "it.",
    ] = "auto"
    normalize: Annotated[
        Literal["none", "tokens", "norm"],
        "Rank by the score (none: summed over tokens, the paper), by the score per token, or by "
        "its cosine with the row's gradient.",
        Mark.IN_CHOICE,
    ] = "none"
    tokens: Annotated[bool, "Also write what each supervised token adds to the score."] = False
    halves: Annotated[
        bool,
        "score_chosen and score_rejected of every row; of a pool above 1,000 rows the chosen ones "
        "and a sample have them otherwise.",
        Mark.RARE,
    ] = False
    rank: Annotated[
        str,
        "Rank of the direction in every matrix, which saves memory and time; full; or auto: 64 "
        "where more than 268 million numbers are selected, and full below.",
        Mark.RARE,
    ] = "auto"
    warmup: Annotated[
        str | None,
        "Fine-tune a LoRA adapter on this share of the pool first, as in 5%, and score with it "
        "merged.",
        Mark.IN_DIRECTION | Mark.RARE,
    ] = None
    checkpoint: Annotated[
        Sequence[str],
        "A checkpoint of one training (model or adapter), PATH or PATH=WEIGHT, repeated: scores at "
        "each add up. A Trainer's output folder gives all of its own, weighted by learning rate.",
        Mark.PATH | Mark.RARE,
    ] = ()
    cascade: Annotated[
        bool,
        "Score exactly only where the best rows may be, and predict the other scores from the "
        "lower blocks; select and repair.",
        Mark.RARE,
    ] = False
    save_adapter: Annotated[
        str | None,
        "Also write the direction, of length one, to this folder as a PEFT LoRA adapter of rank "
        "--rank (or 16).",
        Mark.PATH | Mark.RARE,
    ] = None

    def validate(self) -> None:
        is_rank = self.rank in ("auto", "full") or self.rank.isdecimal()
        if not is_rank or self.rank_number == 0:
            raise BadOption(f"--rank {self.rank}: not a rank; try auto, full or 64")
        if self.warmup and Amount.parse("--warmup", self.warmup).kind != "share":
            raise BadOption(f"--warmup {self.warmup}: not a share of the pool; try 5%")
        if self.tokens and self.engine in ("reverse", "reference"):
            raise BadOption(
                f"--tokens: engine {self.engine} does not tell tokens apart; try --engine forward"
            )
        if self.normalize == "norm" and self.engine not in ("auto", "reverse"):
            raise BadOption(
                f"--normalize norm: engine {self.engine} has no norms of gradients; try --engine "
                "reverse"
            )
        if self.normalize == "norm" and self.tokens:
            raise BadOption("--normalize norm and --tokens: no engine does both; leave one out")

    @property
    def rank_number(self) -> int | None:
        """The rank that is asked for."""
        return int(self.rank) if self.rank.isdecimal() else None

    @property
    def first_engine(self) -> str:
        """The engine to try first."""
        return "reverse" if self.engine == "auto" else self.engine

    @property
    def ranking(self) -> str:
        """The column of scores.parquet to rank by."""
        return {"tokens": "score_per_token", "norm": "score_cosine"}.get(self.normalize, "score")


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions(Options):
    """The processes of a run."""

    group: ClassVar[str] = "Running"

    runtime: Annotated[
        str,
        "local: this process (and those that torchrun started beside it); ray: actors of Ray (with "
        "the extra [ray]) in a cluster for this run, as many as find room, a GPU each where there "
        "is one; or as in ray:address=auto,actors=4,GPU=1,CPU=4: a cluster's HOST:PORT (or auto), "
        "how many, and what each takes.",
        Mark.MENDABLE,
    ] = "local"
    dry_run: Annotated[
        bool,
        "Print the plan (tokens, time, memory, disk) and stop; of a folder with a config.json and "
        "no weights, too.",
        Mark.MENDABLE,
    ] = False

    def validate(self) -> None:
        if self.runtime != "local" and not self.uses_ray:
            raise BadOption(
                f"--runtime {self.runtime}: unknown; try local, ray or ray:actors=4,GPU=1"
            )
        counts = [self.actors] if "actors" in self._ray else []
        values = [*counts, *self.resources.values()]
        if not all(value and value > 0 for value in values) or "" in self._ray.values():
            raise BadOption(
                f"--runtime {self.runtime}: not NAME=NUMBER above 0; try ray:actors=4,GPU=1,CPU=4"
            )

    @property
    def uses_ray(self) -> bool:
        return self.runtime.partition(":")[0] == "ray"

    @property
    def _ray(self) -> Mapping[str, str]:
        settings = self.runtime.partition(":")[2]
        pairs = (text.partition("=") for text in split_names(settings))
        return {name.strip(): value.strip() for name, _, value in pairs}

    @property
    def ray_address(self) -> str | None:
        """The cluster to use; None to start one for this run."""
        return self._ray.get("address")

    @property
    def actors(self) -> int | None:
        """Number of actors; None: all that find room. 0 if the text is no whole number."""
        count = self._ray.get("actors")
        return None if count is None else int(count) if count.isdecimal() else 0

    @property
    def resources(self) -> Mapping[str, float]:
        """Resources of an actor by name; NaN if the text is no number."""
        names = self._ray.keys() - {"address", "actors"}
        return {name: parse_number(self._ray[name]) for name in sorted(names)}


@dataclass(frozen=True, kw_only=True)
class FolderOptions(Options):
    """The folder of the results, and the seed of random choices."""

    group: ClassVar[str] = "Running"

    out: Annotated[
        str | None,
        "Where to write.",
        Mark.REQUIRED | Mark.PATH | Mark.MENDABLE | Mark.IN_CHOICE,
    ] = None
    overwrite: Annotated[
        bool,
        "Start afresh where something is already there.",
        Mark.MENDABLE | Mark.IN_CHOICE,
    ] = False
    seed: Annotated[int, "Of everything that is drawn.", Mark.IN_CHOICE] = 0

    def validate(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise BadOption(f"--seed {self.seed}: must be between 0 and {2**32 - 1}")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(
    FolderOptions,
    RuntimeOptions,
    ScoringOptions,
    CurvatureOptions,
    DirectionOptions,
    TargetOptions,
    RowOptions,
    ModelOptions,
):  # a dataclass takes its fields from the last base first
    """Score every row of a pool by how much training on it would raise the gain on the target
    pairs."""

    command: ClassVar[str] = "score"
    group: ClassVar[str] = "Input"

    pool: Annotated[
        Sequence[str],
        "Files, folders or globs of rows to score; repeat the option for more.",
        Mark.REQUIRED | Mark.PATH,
    ] = ()

    @property
    def tuned(self) -> list[str]:
        """Without `normalize` where the norms of gradients cannot be had."""
        has_norms = self.engine in ("auto", "reverse") and not (self.tokens or self.cascade)
        return [name for name in super().tuned if has_norms or name != "normalize"]

    @property
    def needs_halves(self) -> bool:
        """Whether rows are scored along the chosen half in the pass over the pool, whatever its
        size: asked for, or what a cascade does."""
        return self.halves or self.cascade

    @property
    def amount(self) -> Amount:
        """The budget; `score` counts every positive row."""
        return Amount("positive")

    def validate(self) -> None:
        self._check_required()
        self._check_adapter()
        self._check_combination(self.amount)
        self._check_cascade(self.amount)
        self._check_checkpoints()

    def _check_checkpoints(self) -> None:
        refused = {
            "--direction": self.direction,
            "--adapter": self.adapter,
            "--warmup": self.warmup,
            "--cascade": self.cascade,
            "--tokens": self.tokens,
            "--save-adapter": self.save_adapter,
            "--dry-run": self.dry_run,
            "--rank-by": getattr(self, "rank_by", None),
        }
        for option, value in refused.items():
            if self.checkpoint and value:
                raise BadOption(f"--checkpoint and {option}: of one model alone; leave one out")

    def _check_required(self) -> None:
        model = self.model or self.checkpoint
        required = {"model": model, "pool": self.pool, "out": self.out or self.dry_run}
        for name, value in required.items():
            if not value:
                raise BadOption(
                    f"--{name} is missing; prism {self.command} --help shows what a run needs"
                )
        if bool(self.target) == bool(self.direction):
            raise BadOption(
                "give either --target PAIRS or --direction FILE" + ", not both" * bool(self.target)
            )
        if self.direction and (
            fixed := sorted({*self.changed} & marked(ScoreConfig, Mark.IN_DIRECTION))
        ):
            raise BadOption(
                f"{flag_of(fixed[0])}: a saved direction has that in it; leave it out, or give "
                "--target"
            )

    def _check_adapter(self) -> None:
        if self.layers == "adapter" and not (self.adapter or self.checkpoint):
            raise BadOption("--layers adapter: there is none; give its folder with --adapter")
        if self.warmup and self.adapter:
            raise BadOption(
                "--warmup makes an adapter of its own: leave out --adapter, or save the model "
                "merged"
            )
        if self.save_adapter and self.layers == "adapter":
            raise BadOption(
                "--save-adapter: the direction of an adapter's own weights is no adapter; take "
                "other --layers"
            )
        if self.curvature == "adam" and self.warmup:
            raise BadOption(
                "--curvature adam and --warmup: its moments are of the model before the warm-up; "
                "leave one out"
            )
        if self.curvature == "adam" and self.adapter and self.layers != "adapter":
            raise BadOption(
                f"--curvature adam: the moments in {self.adapter} are of the adapter's own "
                "weights; give --layers adapter, too"
            )

    def _check_combination(self, amount: Amount) -> None:
        chooses = self.command != "score"
        if self.combine in ("round-robin", "concave") and chooses and amount.kind == "positive":
            raise BadOption(
                f"--combine {self.combine} takes rows in turn and knows no positive ones; give a "
                "share"
            )
        if self.tuned and self.curvature in BESIDE_PAIRS:
            raise BadOption(
                f"--tune {self.tune}: the pairs alone do not say how --curvature {self.curvature} "
                "ranks; leave one of both out"
            )
        rank_by = getattr(self, "rank_by", None)
        if rank_by and amount.kind == "positive":
            raise BadOption(f"--rank-by {rank_by}: only scores have a sign; give a share, 5% say")
        if self.combine not in (None, "mean") and len(self.dampings) > 1:
            raise BadOption("several values of --damping: only with --combine mean")

    def _check_cascade(self, amount: Amount) -> None:
        if not self.cascade:
            return
        if self.command == "score":
            raise BadOption(
                "--cascade: looks for the best rows of a budget, and score has none; take select "
                "or repair"
            )
        if amount.kind == "positive":
            raise BadOption(
                "--cascade: predicted scores have no sure sign; give the budget as a share, 5% say"
            )
        needs_exact = {
            "--tokens": self.tokens,
            "--normalize norm": self.normalize == "norm",
            f"--combine {self.combine}": self.combine not in (None, "mean"),
            "--rank-by": bool(getattr(self, "rank_by", None)),
            "several values of --damping": len(self.dampings) > 1,
        }
        for option, present in needs_exact.items():
            if present:
                raise BadOption(
                    f"--cascade and {option}: takes an exact score of every row; leave one out"
                )


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Options):
    """The files of chosen rows."""

    group: ClassVar[str] = "Choice"

    output_format: Annotated[
        Literal["jsonl", "parquet"],
        "Chosen rows as JSON lines, as they came; or as Parquet, with the pool's own types.",
        Mark.IN_CHOICE | Mark.MENDABLE | Mark.RARE,
    ] = "jsonl"
    rank_by: Annotated[
        Ranking | None,
        "Choose by a baseline's ranking instead of the score; with --select-from only "
        f"{', '.join(get_args(CountRanking))}.",
        Mark.IN_CHOICE | Mark.RARE,
    ] = None


@dataclass(frozen=True, kw_only=True)
class SelectConfig(OutputOptions, ScoreConfig):
    """Choose the rows of a pool worth training on: the highest scores under a budget."""

    command: ClassVar[str] = "select"
    group: ClassVar[str] = "Choice"

    groups: Annotated[
        str | None,
        "Groups of pairs that the choice must serve: auto finds them by the pairs' gradients, a "
        "number asks for so many, 1 is one target. Named targets are groups already  [default: "
        "auto, where the other options leave the choice to scores].",
    ] = None
    budget: Annotated[
        str,
        "How much to choose: 5%, 500 (rows), 200000tok (supervised tokens) or positive.",
        Mark.REQUIRED | Mark.IN_CHOICE,
    ] = "5%"
    per_source: Annotated[
        str | None, "Most that one source may take of the budget, as in 30%.", Mark.IN_CHOICE
    ] = None
    near_duplicates: Annotated[
        float | None,
        "MinHash similarity (0 to 1) from which on only the best-scored row stays, as in 0.8.",
        Mark.IN_CHOICE,
    ] = None
    select_from: Annotated[
        str | None,
        "Choose again from the scores of this run folder, without a model.",
        Mark.PATH | Mark.IN_CHOICE,
    ] = None

    @property
    def amount(self) -> Amount:
        return Amount.parse("--budget", self.budget)

    @property
    def has_groups(self) -> bool:
        """Whether pairs are to be parted into groups: by default where nothing stands against
        it."""
        if self.groups is None:
            return not (self.select_from or self.has_names or any(self._against_groups.values()))
        return self.groups != "1"

    @property
    def has_names(self) -> bool:
        """Whether targets are named, which makes them groups."""
        return len(self.target) > 1 or bool(self.target_by)

    @property
    def _against_groups(self) -> Mapping[str, Any]:
        return {
            f"--combine {self.combine}": self.combine in ("mean", "max"),
            "--budget positive": self.amount.kind == "positive",
            "--direction": self.direction,
            "--cascade": self.cascade,
            "--checkpoint": self.checkpoint,
            f"--curvature {self.curvature}": self.curvature in BESIDE_PAIRS,
            f"--weighting {self.weighting}": self.weighting == "unpaired",
            f"--rank-by {self.rank_by}": self.rank_by,
        }

    @property
    def group_count(self) -> int | None:
        """None: to be found."""
        return None if self.groups in (None, "auto") else int(self.groups)

    def validate(self) -> None:
        is_count = self.groups and self.groups.isdecimal() and int(self.groups) > 0
        if self.groups not in (None, "auto") and not is_count:
            raise BadOption(f"--groups {self.groups}: not a number of groups; try auto or 8")
        self._check_groups()
        if self.per_source and Amount.parse("--per-source", self.per_source).kind != "share":
            raise BadOption(f"--per-source {self.per_source}: not a share of the budget; try 30%")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise BadOption(
                f"--near-duplicates {self.near_duplicates}: not between 0 and 1; try 0.8"
            )

    def _check_groups(self) -> None:
        if self.groups in (None, "1"):
            return
        if self.has_names:
            raise BadOption(
                f"--groups {self.groups}: named targets are groups already; leave it out, and give "
                "--combine round-robin"
            )
        for option, present in self._against_groups.items():
            if present:
                raise BadOption(
                    f"--groups {self.groups} and {option}: rows are chosen by their scores along "
                    "groups of pairs; leave one out"
                )

    def _check_required(self) -> None:
        if not self.select_from:
            return super()._check_required()
        if self.dry_run:
            raise BadOption("--select-from takes seconds and has no plan: leave out --dry-run")
        readable = marked(SelectConfig, Mark.IN_CHOICE)
        if refused := [flag_of(name) for name in self.changed if name not in readable]:
            raise BadOption(
                f"--select-from takes scores as they are: leave out {', '.join(refused)}"
            )
        if not self.out:
            raise BadOption("--out is missing: the folder for the new choice")


@dataclass(frozen=True, kw_only=True)
class RepairConfig(OutputOptions, ScoreConfig):
    """Remove the rows that push a model the wrong way: towards the rejected answers of the
    pairs."""

    command: ClassVar[str] = "repair"
    group: ClassVar[str] = "Choice"

    remove: Annotated[
        str,
        "How much to remove: 10%, 500 (rows), 200000tok or positive (every harmful row).",
        Mark.REQUIRED,
    ] = "10%"
    label_field: Annotated[
        str | None, "Column that is true on bad rows; prints how well the ranking finds them."
    ] = None

    @property
    def amount(self) -> Amount:
        return Amount.parse("--remove", self.remove)
