"""Command line: parse, call, print; the only place that prints or exits.

    exit 0 done    2 the user can mend it: one line on stderr    1 a defect of ours    130 interrupted, resumable

Choices made here: options are the fields of the configs, so a help text stands in one place; a
value on the command line wins over --config; `--pool a b c` is read as three pools, as a shell's
wildcard gives them."""

import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import click
from click.shell_completion import CompletionItem

from prism_select.cli.summaries import evaluation_summary, failed, pairs_summary, summary
from prism_select.cli.terminal import Terminal, printable
from prism_select.run.config import RepairConfig, ScoreConfig, SelectConfig
from prism_select.run.config_evaluate import EvaluateConfig, ReportConfig
from prism_select.run.config_pairs import PairsConfig
from prism_select.run.errors import BadOption, PeerLost, PrismError, out_of_memory
from prism_select.run.options import Options, from_toml
from prism_select.scoring.processes import is_main_process, is_single_process

__all__ = ["ANYWHERE", "app", "main"]

ANYWHERE = ("--debug", "--json", "--quiet")  # of all commands


NEEDED = (
    "model",
    "pool",
    "target",
    "out",
    "budget",
    "remove",
    "holdout",
    "how",
)  # what help shows first


FILES = (
    "model",
    "adapter",
    "pool",
    "target",
    "out",
    "holdout",
    "direction",
    "select_from",
    "curvature_from",
)


EXAMPLES = {
    "score": "--model MODEL --pool pool.jsonl --target pairs.jsonl --out run",
    "select": "--model MODEL --pool pool.jsonl --target pairs.jsonl --out run --budget 5%",
    "repair": "--model MODEL --pool sft.jsonl --target pairs.jsonl --out run --remove 10%",
    "pairs": "solutions.jsonl --how numbers --out pairs.jsonl",
    "evaluate": "run --holdout held_out.jsonl",
    "report": "run",
}


def option(name: str, hint: Any, default: Any) -> click.Option:
    """The option of one field; not given means None, so that a config file can speak first."""
    kind, text = get_args(hint)[:2]
    flag, shown = (
        "--" + name.replace("_", "-"),
        ", ".join(map(str, default)) if isinstance(default, tuple) else str(default),
    )
    if kind is bool:
        return click.Option([flag, name], is_flag=True, default=None, help=text)
    values = (
        [str(value) for value in get_args(kind) if str(value)]
        if get_origin(kind) is Literal
        else []
    )

    def complete(
        context: click.Context, parameter: click.Parameter, begun: str
    ) -> list[CompletionItem]:
        if name in FILES:
            return [CompletionItem(begun, type="file")]
        return [CompletionItem(value) for value in values if value.startswith(begun)]

    return click.Option(
        [flag, name],
        type=kind if kind in (int, float) else str,
        default=None,
        multiple=kind == Sequence[str],
        help=text
        + (f" One of {', '.join(values)}." if values else "")
        + (f"  [default: {shown}]" if shown else ""),
        shell_complete=complete,
    )


class _Command(click.Command):
    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """What a run needs, then all the rest."""
        parts: tuple[list[tuple[str, str]], ...] = ([], [])
        for parameter in self.get_params(context):
            if record := parameter.get_help_record(context):
                parts[parameter.name not in NEEDED].append(record)
        for title, records in zip(("What it needs", "Options"), parts, strict=True):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def command(kind: type[Options]) -> click.Command:
    """`prism score`, say, of ScoreConfig."""
    hints = get_type_hints(kind, include_extras=True)
    params: list[click.Parameter] = [
        click.Argument([f.name], required=False, nargs=-1 if f.name == "runs" else 1)
        if f.name in ("file", "run", "runs")
        else option(f.name, hints[f.name], f.default)
        for f in fields(kind)
    ]
    params.append(
        click.Option(["--config"], help="TOML file that sets any option; the command line wins.")
    )

    def call(config: str | None, **given: Any) -> None:
        values = dict(from_toml(kind, config)) if config else {}
        values.update(
            {name: value for name, value in given.items() if value is not None and value != ()}
        )
        execute_and_tell(kind(**values), click.get_current_context().ensure_object(Terminal))

    example = f"For example: prism {kind.command} {EXAMPLES[kind.command]}"
    told = " ".join((kind.__doc__ or "").split())
    short = re.split(r"[.:](?:\s|$)|\s\(|(?<=\?)\s", told)[0]
    return _Command(
        kind.command, params=params, callback=call, help=told, epilog=example, short_help=short
    )


def execute_and_tell(config: Options, terminal: Terminal) -> None:
    from prism_select.api import execute, execute_evaluation, execute_pairs, execute_report
    from prism_select.run.folder import Run

    scores = isinstance(config, ScoreConfig) and not (
        isinstance(config, SelectConfig) and config.select_from
    )
    if not (scores or is_single_process()):
        raise BadOption(
            f"prism {config.command}: here one process does it all; start it without torchrun"
        )
    if isinstance(config, ReportConfig):
        page = str(execute_report(config))
        terminal.end({"report": page}, {"report": page})
        return
    if isinstance(config, PairsConfig):
        made = execute_pairs(config, terminal)
        terminal.end(made if isinstance(made, dict) else asdict(made), pairs_summary(config, made))
        return
    if isinstance(config, EvaluateConfig):
        told = execute_evaluation(config, terminal)
        terminal.end({"run": config.run, **told}, evaluation_summary(config, told), failed(told))
        return
    assert isinstance(config, ScoreConfig)
    done = execute(config, terminal)
    if isinstance(done, Run):
        manifest = done.manifest
        files = sorted(path.name for path in done.path.iterdir() if path.is_file())
        terminal.end(
            {"run": str(done.path), "files": files, **manifest}, summary(done.path, manifest)
        )
        return
    plan = {
        "tokens": f"{done.tokens:,}",
        "time": f"{done.seconds:,.0f} s for the whole run, on this machine as it is now",
        "memory": f"{done.memory_bytes / 1e9:.2f} GB at the highest",
        "disk": f"{done.disk_bytes / 2**20:.1f} MiB in the run folder",
    }
    terminal.end(asdict(done), plan)


class Interrupted(Exception):
    """Ctrl-C or a polite kill. Click would print an empty line of its own for it."""


class _Group(click.Group):
    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            raise Interrupted from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="prism-select", prog_name="prism")
@click.option("--debug", is_flag=True, help="Print the traceback of a defect.")
@click.option(
    "--json",
    is_flag=True,
    help="Print the summary as one JSON object, and nothing else on standard output.",
)
@click.option("--quiet", is_flag=True, help="Print nothing but the summary.")
@click.pass_context
def app(context: click.Context, debug: bool, json: bool, quiet: bool) -> None:
    """PRISM chooses fine-tuning data: every row of a pool gets a score, how much training on it
    would move this model towards the behaviour that pairs of answers show.

    --debug, --json and --quiet may stand anywhere in a command."""
    context.obj = Terminal(json, quiet, silent=not is_main_process())


@app.command(short_help="Run the main jobs offline, on a bundled model")
@click.option("--out", default="prism-demo", show_default=True, help="Folder to write.")
@click.pass_obj
def demo(terminal: Terminal, out: str) -> None:
    """Run the main jobs offline, on a bundled model and a small generated world, in under two
    minutes."""
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # read when torch loads: a tiny model is slower with more
    from prism_select.demo.story import tell

    figures = tell(out, terminal)
    if terminal.json:
        terminal.end(asdict(figures), {})


for config_kind in (
    ScoreConfig,
    SelectConfig,
    RepairConfig,
    EvaluateConfig,
    ReportConfig,
    PairsConfig,
):
    app.add_command(command(config_kind))


def spread(arguments: Sequence[str]) -> list[str]:
    """`--pool a b` → `--pool a --pool b`."""
    words: list[str] = []
    pool = False
    for word in arguments:
        pool = word == "--pool" if word.startswith("-") else pool
        if pool and not word.startswith("-") and words[-1] != "--pool":
            words.append("--pool")
        words.append(word)
    return words


def fail(message: str, code: int, silent: bool = False) -> NoReturn:
    if not silent:
        print(f"prism: {printable(message)}", file=sys.stderr)
    sys.exit(code)


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    signal.signal(signal.SIGTERM, interrupt)
    if not debug:
        warnings.simplefilter("ignore")
    command = [word for word in spread(words) if word not in ANYWHERE]
    rest = [word for word in ANYWHERE if word in words] + command
    again = (
        "the same command, without --overwrite," if "--overwrite" in command else "the same command"
    )
    resumes = (
        "nothing was written"
        if command[:1] in (["pairs"], ["report"])
        else f"{again} goes on where it stopped"
    )
    guarded(lambda: app.main(rest, prog_name="prism", standalone_mode=False), debug, resumes)


def guarded(call: Callable[[], Any], debug: bool, resumes: str) -> None:
    """Every way to end, in one place; `resumes` is what an interruption leaves."""
    try:
        code = call()
    except PrismError as error:
        fail(str(error), 2, silent=isinstance(error, PeerLost) and not is_main_process())
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = 0
    except click.ClickException as error:
        where = (
            error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "prism"
        )
        fail(f"{error.format_message()} See {where} --help", 2)
    except (Interrupted, KeyboardInterrupt, click.Abort):
        fail(f"interrupted; {resumes}", 130, silent=not is_main_process())
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if debug:
            print("\n".join(map(printable, traceback.format_exc().splitlines())), file=sys.stderr)
        first = (str(error).splitlines() or [""])[0]
        if out_of_memory(error):
            advice = "free memory on the device, or take fewer --batch-tokens"
            fail(f"{first.removesuffix('.') or 'out of memory'}; {advice}; {resumes}", 2)
        fail(
            f"a defect of prism: {type(error).__name__}: {first}; add --debug for the traceback and report it",
            1,
        )
    sys.exit(code if isinstance(code, int) else 0)
