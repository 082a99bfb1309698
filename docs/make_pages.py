"""Writes into the docs what stands elsewhere: options from the configs, figures from the results,
the tree from the packages, output from real runs.

    docs/options.md             the configs
    docs/measurements.md        measurements.in.txt, with figures
    docs/cost.svg, growth.svg   plots of results
    README.md, docs/**/*.md     the marked spots in them

    {{FILE / FIGURE / FORMAT}}                   a figure of benchmarks/results/FILE.json
    {{FILE / key=value, … / COLUMN / FORMAT}}    a column of the one row that has these values;
                                                 dots go deeper
    {{row / LABEL / FILE / FIGURE / FORMAT / BASELINE}}
                                                 a line of a table, with interval and bar
    {{interval / FILE / FIGURE / FORMAT}}        its interval
    {{rows / FILE}}                              where the rows of a study are
    <!--{{…}}-->0.24<!---->                      a figure in a page that is written by hand
    <!-- made: NAME --> … <!-- end -->           a block: `tree`, `memory`, or `output` of
                                                 COMMANDS

Choices made here:
- FORMAT is Python's, .2f say; a figure or a row that is missing is an error;
- "forwards", a unit of the results, is "× the cost of a forward pass" in prose;
- `--quick` leaves the output of commands as it is: that takes a minute or two.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from ast import get_docstring, parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import altair as alt
import click
import vl_convert

from prism_select.cli.app import ANYWHERE, app
from prism_select.run.config import RepairConfig, ScoreConfig, SelectConfig
from prism_select.run.config_evaluate import EvaluateConfig, ReportConfig
from prism_select.run.config_pairs import PairsConfig
from prism_select.run.options import Mark, Option, flag_of, options_of

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = ROOT / "benchmarks" / "results"
SPOT = re.compile(r"<!--(\{\{.*?\}\})-->.*?<!---->", re.DOTALL)
BLOCK = re.compile(r"(<!-- made: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
UNITS = {
    "forwards": "× the cost of a forward pass",
    "forwards of the pool": "forward passes over the pool",
    "times the cost": "× the cost",
    "times": "×",
    "auroc": "AUROC",
    "share": "",
}

# --- options ---------------------------------------------------------------

OPTIONS = {
    "prism score, select and repair": ScoreConfig,
    "prism select": SelectConfig,
    "prism repair": RepairConfig,
    "prism pairs": PairsConfig,
    "prism evaluate": EvaluateConfig,
    "prism report": ReportConfig,
}
ENVIRONMENT = """\
With `--json` the summary is one JSON object, and progress goes to standard error. Exit codes are
0 (done), 2 (an error that you can mend), 1 (a defect of PRISM) and 130 (interrupted). `NO_COLOR=1`
in the environment turns colours off. Your shell completes options after
`eval "$(_PRISM_COMPLETE=bash_source prism)"` (`zsh_source`, `fish_source`)."""


def options_page() -> str:
    """A table for each group of options, as in `--help`; what select, repair and pairs share with
    score stands once."""
    shared = list(options_of(ScoreConfig))
    lines = [
        "# Options",
        "",
        "Each option is a key of the same name in a TOML file given as `--config`. The command",
        "line wins. A flag also has its opposite: `--no-overwrite`.",
    ]
    for title, kind in OPTIONS.items():
        options = [
            option for option in options_of(kind) if kind is ScoreConfig or option not in shared
        ]
        groups = list(dict.fromkeys(option.group for option in options))
        lines += ["", f"## {title}"]
        for group in groups:
            lines += [f"\n### {group}"] if len(groups) > 1 else []
            lines += ["", "| option | values | default | |", "|---|---|---|---|"]
            lines += [option_row(option) for option in options if option.group == group]
    lines += [
        "",
        "`prism pairs` also takes the options above on the model, columns, the direction and",
    ]
    lines += ["the folder."]
    lines += ["", "## prism demo", ""]
    lines += ["`--out` is the folder to write  [default: `prism-demo`].", "", "## Every command"]
    lines += ["", "| option | |", "|---|---|"]
    lines += [
        f"| `{param.opts[0]}` | {param.help} |"
        for param in app.params
        if isinstance(param, click.Option) and param.opts[0] in ANYWHERE
    ]
    return "\n".join([*lines, "", ENVIRONMENT, ""])


def option_row(option: Option) -> str:
    kinds = {str: "text", int: "a number", float: "a number", bool: "a flag"}
    choices = ", ".join(f"`{choice}`" for choice in option.choices)
    values = choices or kinds.get(option.kind, "text, several")
    default = "" if option.default in (None, (), False) else f"`{option.default}`"
    name = option.name.upper() if Mark.ARGUMENT in option.mark else flag_of(option.name)
    return f"| `{name}` | {values} | {default} | {option.help} |"


# --- figures ---------------------------------------------------------------


def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def figure(file: str, name: str) -> Any:
    """One figure of a study: {name, value, unit, wanted, holds, interval}."""
    matches = [line for line in results(file)["figures"] if line["name"] == name]
    assert len(matches) == 1, f"{len(matches)} figures {name!r} in {file}.json"
    return matches[0]


def cell(file: str, values: str, column: str) -> Any:
    """A column of the one row of a study with these values, as in `scenario=arc, method=less`."""
    wanted = dict(pair.split("=", 1) for pair in values.split(", "))
    rows = [
        row
        for row in results(file)["rows"]
        if all(str(row.get(key)) == value for key, value in wanted.items())
    ]
    assert len(rows) == 1, f"{len(rows)} rows {values!r} in {file}.json"
    value = rows[0]
    for key in column.split("."):
        value = value[key]
    return value


def table_row(label: str, file: str, name: str, form: str, baseline: str = "") -> str:
    line = figure(file, name)
    unit = UNITS.get(line["unit"], line["unit"])
    if name.endswith(" gain"):
        unit = "nats per token"
    ends = interval_text(file, name, form)
    state = {True: "holds", False: "**falls short**"}.get(line["holds"], "")
    bar = f"{line['wanted']}: {state}" if line["wanted"] else ""
    value = format(line["value"], form)
    return f"| {label} | {value} {unit}".rstrip() + f" | {ends} | {baseline} | {bar} |"


def interval_text(file: str, name: str, form: str) -> str:
    return " to ".join(format(end, form) for end in figure(file, name).get("interval") or [])


def rows_line(name: str) -> str:
    study, path = results(name), f"benchmarks/results/{name}.json"
    machine, versions = study["machine"], study["versions"]
    return (
        f"Rows and all figures: [{path}](../{path}), {study['date']}, "
        f"{machine['cores']} cores ({machine['processor']}), torch {versions['torch']}."
    )


def filled(text: str) -> str:
    """Text with every `{{…}}` replaced, innermost first."""

    def value(match: re.Match[str]) -> str:
        words = [word.strip() for word in match[1].split(" / ")]
        if words[0] == "row":
            return table_row(*words[1:])
        if words[0] == "interval":
            return interval_text(*words[1:])
        if words[0] == "rows":
            return rows_line(words[1])
        *where, form = words
        found = cell(*where) if "=" in where[1] and len(where) == 3 else figure(*where)["value"]
        return format(found, form)

    while (after := re.sub(r"\{\{([^{}]*)\}\}", value, text)) != text:
        text = after
    return text


def measurements_page() -> str:
    return filled((DOCS / "measurements.in.txt").read_text(encoding="utf-8"))


# --- marked spots in pages that are written by hand ------------------------


def marked_pages() -> list[Path]:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
    return [page for page in pages if page.relative_to(ROOT).as_posix() not in GENERATED]


def remade(text: str, blocks: dict[str, Callable[[], str]]) -> str:
    """A page with its figures, and those of `blocks` that it has, written anew."""
    assert len(BLOCK.findall(text)) == text.count("<!-- made: "), "a block without a line in it"
    assert not re.search(r"^ *<!--\{\{", text, re.MULTILINE), (
        "a line that starts so is a block of HTML"
    )
    text = SPOT.sub(lambda m: f"<!--{m[1]}-->{filled(m[1])}<!---->", text)
    return BLOCK.sub(lambda m: m[1] + blocks[m[2]]() + m[3] if m[2] in blocks else m[0], text)


def tree() -> str:
    """The packages, from the doors down, each with the first line of its docstring; their order is
    that of the layers in pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    lines = ["src/prism_select/"]
    for room in (name for layer in layers for name in layer.split(" | ") if name != "__main__"):
        path = ROOT / "src" / "prism_select" / room
        file, name = path / "__init__.py", f"{room}/"
        if not path.is_dir():
            file, name = path.with_suffix(".py"), f"{room}.py"
        text = get_docstring(parse(file.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name:<13} {text.splitlines()[0]}")
    return "\n".join(["```", *lines, "```"])


# --- memory ----------------------------------------------------------------

SHAPES = {  # hidden, blocks, query heads, key heads, of the MLP, vocabulary
    "Llama-3.2-1B": (2048, 16, 32, 8, 8192, 128256),
    "Llama-3.1-8B": (4096, 32, 32, 8, 14336, 128256),
    "Qwen2.5-14B": (5120, 48, 40, 8, 13824, 152064),
    "Llama-3.1-70B": (8192, 80, 64, 8, 28672, 128256),
}
ROW = 1024  # tokens


def memory() -> str:
    """GB for a whole run with directions of a low rank and with full ones, by the code of the plan
    without weights."""
    planned = "" if any(o.name == "quantize" for o in options_of(ScoreConfig)) else ", planned"
    widths = f"16 bits | 8 bits{planned} | 4 bits{planned}"
    lines = [
        f"| shapes of | `--layers` | {widths} | the batch in it |",
        "|---|---|---|---|---|---|",
    ]
    for name in SHAPES:
        for layers in ("all", "late", "adapter"):
            batch, *totals = needs(name, layers)
            cells = " | ".join(f"{low:,.0f} / {full:,.0f}" for low, full in totals)
            lines.append(f"| {name} | {layers} | {cells} | {batch[0]:,.0f} |")
    return "\n".join(lines)


def needs(name: str, layers: str) -> list[tuple[float, float]]:
    """GB with directions of a low rank and with full ones: for a batch, and, with weights of 16, 8
    and 4 bits, for a whole run."""
    from peft import LoraConfig

    from prism_select.core.layers import is_large
    from prism_select.models.causal_lm import CausalLM
    from prism_select.models.layer_selection import select_parameters
    from prism_select.models.without_weights import network_of, with_adapter_shapes
    from prism_select.scoring.model_plan import RANK, run_bytes, scoring_along, weight_bytes

    config = ScoreConfig(model="-", pool=("-",), target=("-",), out="-")
    network = network_of(shapes_config(name))
    if layers == "adapter":
        lora = LoraConfig(r=16, target_modules="all-linear")
        network = with_adapter_shapes(network, lora)
    model, weights = CausalLM(network), select_parameters(network, layers)
    shape = config.tokens_on("cuda", model.size) // ROW, ROW
    full = scoring_along(model, weights, shape, None, 1 if is_large(weights) else 2)
    low = scoring_along(model, weights, shape, RANK)
    runs = run_bytes(weights, full, low), run_bytes(weights, full)
    sizes = [weight_bytes(network, bits) for bits in (16, 8, 4)]
    totals = [((size + runs[0]) / 1e9, (size + runs[1]) / 1e9) for size in sizes]
    return [(low.batch_bytes / 1e9, full.batch_bytes / 1e9), *totals]


def shapes_config(name: str) -> Any:
    """Transformers' configuration of these shapes."""
    import transformers

    hidden, blocks, heads, key_heads, inner, vocabulary = SHAPES[name]
    kind = transformers.Qwen2Config if "Qwen" in name else transformers.LlamaConfig
    return kind(
        hidden_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings="1B" in name,
        dtype="bfloat16",
    )


# Commands of the README, and the lines of their summary that it shows.
COMMANDS = (
    (
        "prism pairs --check pairs.jsonl --model MODEL",
        ("held-out pairs", "pairs", "agreement", "common part", "warning"),
    ),
    (
        "prism select --model MODEL --pool pool.jsonl --target pairs.jsonl --out run --budget 5%",
        ("held-out pairs", "read", "verdicts", "chosen of", "report"),
    ),
    (
        "prism evaluate run --holdout held_out.jsonl --against random --seeds 1",
        ("none", "prism", "random", "verdict", "report"),
    ),
)


def output() -> str:
    """What COMMANDS print on a part of the demo's data; takes a minute or two."""
    from prism_select.demo.story import MODEL
    from prism_select.demo.world import DEMO_SKILL, pairs, pool

    files = {
        "pool": pool(800, 0),
        "pairs": pairs(DEMO_SKILL, 40, 0),
        "held_out": pairs(DEMO_SKILL, 100, 1),
    }
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # a tiny model is faster so
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "MODEL").symlink_to(MODEL)
        for name, rows in files.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (Path(folder) / f"{name}.jsonl").write_text(text, encoding="utf-8")
        for command, labels in COMMANDS:
            words = [sys.executable, "-m", "prism_select", *shlex.split(command)[1:]]
            done = subprocess.run(
                words, cwd=folder, env=one_thread, capture_output=True, text=True, check=True
            )
            shown = [line for line in done.stdout.splitlines() if line.startswith(labels)]
            lines += [f"$ {command}", *shown, ""]
    return "\n".join(["```console", *lines[:-1], "```"])


# --- plots -----------------------------------------------------------------


def drawn(chart: Any) -> str:
    """As SVG on white, so that a dark page shows it, too."""
    plain = chart.configure(background="white", padding=12, font="sans-serif")
    return str(vl_convert.vegalite_to_svg(plain.configure_axis(grid=False).to_dict())) + "\n"


def cost_plot() -> str:
    """Cost of each way to the same scores in forward passes, PRISM's darker, with the least and the
    most of its rounds."""
    ways = {
        "forward all": "forward pass: the unit",
        "difference late": "PRISM, upper half of the blocks",
        "difference all": "PRISM, all parameters",
        "kronfluence": "kronfluence",
        "bergson": "bergson",
        "reference all": "row by row",
    }
    found = {title: figure("cost_peers", f"beside peers: {way}") for way, title in ways.items()}
    rows = [
        {
            "way": title,
            "cost": line["value"],
            "low": line["interval"][0],
            "high": line["interval"][1],
        }
        for title, line in found.items()
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(y=alt.Y("way:N", sort=None, title=None))
    colour = alt.condition(
        "substring(datum.way, 0, 5) == 'PRISM'", alt.value("#0b5394"), alt.value("#9aa5b1")
    )
    bars = base.mark_bar(height=16).encode(
        x=alt.X("cost:Q", title="cost in forward passes over the pool"), color=colour
    )
    spread = base.mark_rule(strokeWidth=1.5).encode(x="low:Q", x2="high:Q")
    return drawn((bars + spread).properties(width=420, height=170))


def growth_plot() -> str:
    """Seconds against each size, both by powers of ten."""
    rows = results("growth")["rows"]
    panels = []
    for name in dict.fromkeys(row["of"] for row in rows):
        values = [row for row in rows if row["of"] == name]
        axes = [
            alt.X(
                "size:Q",
                title=name.replace("numbers of the model", "parameters of the model"),
                scale=alt.Scale(type="log"),
                axis=alt.Axis(tickCount=4, format="~s"),
            ),
            alt.Y(
                "seconds:Q",
                title="seconds",
                scale=alt.Scale(type="log"),
                axis=alt.Axis(tickCount=4),
            ),
        ]
        chart = alt.Chart(alt.Data(values=values)).mark_line(point=True)
        panels.append(
            chart.encode(*axes, color=alt.value("#0b5394")).properties(width=150, height=150)
        )
    return drawn(alt.hconcat(*panels))


GENERATED = {
    "docs/options.md": options_page,
    "docs/measurements.md": measurements_page,
    "docs/cost.svg": cost_plot,
    "docs/growth.svg": growth_plot,
}


def write(blocks: dict[str, Callable[[], str]]) -> None:
    for name, page in GENERATED.items():
        (ROOT / name).write_text(page(), encoding="utf-8")
    for path in marked_pages():
        text = path.read_text(encoding="utf-8")
        if (after := remade(text, blocks)) != text:
            path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    quick: dict[str, Callable[[], str]] = {"tree": tree, "memory": memory}
    write(quick if "--quick" in sys.argv else {**quick, "output": output})
