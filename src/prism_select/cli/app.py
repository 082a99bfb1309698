"""Command line: parse, call, print; the only module that prints or exits.

    exit 0   the command is done
    exit 1   a defect of the program
    exit 2   an error of the user: one line on standard error
    exit 130 interrupted; the same command resumes the run

Choices made here:
- options are the fields of the configs: each help text stands in one place;
- a value on the command line wins over --config;
- `--pool a b c` means three pools, since a shell expands wildcards.
"""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

import click

from prism_select.cli.parameters import ConfigCommand
from prism_select.cli.summaries import (
    evaluation_summary,
    failed_controls,
    pairs_summary,
    plan_summary,
    run_summary,
)
from prism_select.cli.terminal import Terminal, printable
from prism_select.run.config import RepairConfig, ScoreConfig, SelectConfig
from prism_select.run.config_evaluate import EvaluateConfig, ReportConfig
from prism_select.run.config_pairs import PairsConfig
from prism_select.run.errors import BadOption, PeerLost, PrismError, out_of_memory
from prism_select.run.options import Options
from prism_select.scoring.processes import is_main_process, is_single_process

__all__ = ["ANYWHERE", "app", "main"]

ANYWHERE = ("--debug", "--json")  # options of every command
EXAMPLES: dict[type[Options], str] = {
    ScoreConfig: "--model MODEL --pool pool.jsonl --target pairs.jsonl --out run",
    SelectConfig: "--model MODEL --pool pool.jsonl --target pairs.jsonl --out run --budget 5%",
    RepairConfig: "--model MODEL --pool sft.jsonl --target pairs.jsonl --out run --remove 10%",
    EvaluateConfig: "run --holdout held_out.jsonl",
    ReportConfig: "run",
    PairsConfig: "solutions.jsonl --how numbers --out pairs.jsonl",
}


def run(config: Options, context: click.Context) -> None:
    """Runs the command of a config and prints its summary."""
    terminal = context.ensure_object(Terminal)
    again = isinstance(config, SelectConfig) and config.select_from
    if (again or not isinstance(config, ScoreConfig)) and not is_single_process():
        raise BadOption(
            f"prism {config.command}: here one process does it all; start it without torchrun"
        )
    if isinstance(config, ScoreConfig):
        _run_scores(config, terminal)
    elif isinstance(config, PairsConfig):
        _run_pairs(config, terminal)
    elif isinstance(config, EvaluateConfig):
        _run_evaluation(config, terminal)
    elif isinstance(config, ReportConfig):
        from prism_select.api import execute_report

        page = {"report": str(execute_report(config))}
        terminal.end(page, page)


def _run_scores(config: ScoreConfig, terminal: Terminal) -> None:
    from prism_select.api import execute
    from prism_select.run.folder import Run

    result = execute(config, terminal)
    if not isinstance(result, Run):
        terminal.end(asdict(result), plan_summary(result))
        return
    manifest = result.manifest
    files = sorted(path.name for path in result.path.iterdir() if path.is_file())
    values = {"run": str(result.path), "files": files, **manifest}
    terminal.end(values, run_summary(result.path, files, manifest))


def _run_pairs(config: PairsConfig, terminal: Terminal) -> None:
    from prism_select.api import execute_pairs

    result = execute_pairs(config, terminal)
    values = result if isinstance(result, dict) else asdict(result)
    terminal.end(values, pairs_summary(config, result))


def _run_evaluation(config: EvaluateConfig, terminal: Terminal) -> None:
    from prism_select.api import execute_evaluation

    values = execute_evaluation(config, terminal)
    rows = evaluation_summary(config, values)
    terminal.end({"run": config.run, **values}, rows, failed_controls(values))


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; click prints an empty line for its own class."""


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
@click.pass_context
def app(context: click.Context, debug: bool, json: bool) -> None:
    """PRISM chooses fine-tuning data: every row of a pool gets a score, how much training on it
    would move this model towards the behaviour that pairs of answers show.

    --debug and --json may stand anywhere in a command."""
    context.obj = Terminal(json, silent=not is_main_process())


@app.command(short_help="Run the main jobs offline, on a bundled model")
@click.option("--out", default="prism-demo", show_default=True, help="Folder to write.")
@click.pass_obj
def demo(terminal: Terminal, out: str) -> None:
    """Run the main jobs offline, on a bundled model and a small generated world, in under two
    minutes."""
    # torch reads it when it loads; a tiny model is slower on several threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from prism_select.demo.story import run_demo

    figures = run_demo(out, terminal)
    if terminal.json:
        terminal.end(asdict(figures), {})


for kind, example in EXAMPLES.items():
    app.add_command(ConfigCommand(kind, example, run))


def spread(arguments: Sequence[str]) -> list[str]:
    """`--pool a b` → `--pool a --pool b`."""
    words: list[str] = []
    in_pool = False
    for word in arguments:
        in_pool = word == "--pool" if word.startswith("-") else in_pool
        if in_pool and not word.startswith("-") and words[-1] != "--pool":
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
    flags = [word for word in ANYWHERE if word in words]
    if command[:1] in (["pairs"], ["report"]):
        advice = "nothing was written"
    elif "--overwrite" in command:
        advice = "the same command, without --overwrite, goes on where it stopped"
    else:
        advice = "the same command goes on where it stopped"
    guarded(
        lambda: app.main([*flags, *command], prog_name="prism", standalone_mode=False),
        debug,
        advice,
    )


def guarded(call: Callable[[], Any], debug: bool, advice: str) -> None:
    """Calls, and exits in one of all possible ways. `advice` is for an unfinished run."""
    try:
        code = call()
    except PrismError as error:
        fail(str(error), 2, silent=isinstance(error, PeerLost) and not is_main_process())
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = 0
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        command = context.command_path if context else "prism"
        fail(f"{error.format_message()} See {command} --help", 2)
    except (Interrupted, KeyboardInterrupt, click.Abort):
        fail(f"interrupted; {advice}", 130, silent=not is_main_process())
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if debug:
            print("\n".join(map(printable, traceback.format_exc().splitlines())), file=sys.stderr)
        line = (str(error).splitlines() or [""])[0]
        if out_of_memory(error):
            what = line.removesuffix(".") or "out of memory"
            remedy = "free memory on the device, or take fewer --batch-tokens"
            fail(f"{what}; {remedy}; {advice}", 2)
        name = type(error).__name__
        remedy = "add --debug for the traceback and report it"
        fail(f"a defect of prism: {name}: {line}; {remedy}", 1)
    sys.exit(code if isinstance(code, int) else 0)
