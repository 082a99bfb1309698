"""Parameters: a click command from the fields of a config, with its help in groups.

    cascade: Annotated[bool, "help", Mark.RARE]   →   --cascade / --no-cascade, "Rarely needed"

Choices made here:
- an option left out is None, so a value of --config stays;
- the help starts with the needed options and ends with the rare ones; between them each section
  of the config is a group.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

import click
from click.shell_completion import CompletionItem

from prism_select.run.config import keeping_given
from prism_select.run.options import Config, Mark, Option, flag_of, from_toml, options_of

__all__ = ["ConfigCommand"]

NEEDED, RARE = "What a run needs", "Rarely needed"
GROUPS = (
    NEEDED,
    "Input",
    "Target",
    "Direction",
    "Scoring",
    "Choice",
    "Pairs",
    "Evaluation",
    "Running",
    RARE,
)


class ConfigCommand(click.Command):
    """`prism score`, for example, from ScoreConfig: `run` is called with the config."""

    def __init__(
        self, kind: type[Config], example: str, run: Callable[[Config, click.Context], None]
    ) -> None:
        options = sorted(options_of(kind), key=_order)
        self.options = {option.name: option for option in options}
        text = " ".join((kind.__doc__ or "").split())

        @click.pass_context
        def call(context: click.Context, /, config: str | None, **values: object) -> None:
            in_file = from_toml(kind, config) if config else {}
            on_line = {k: v for k, v in values.items() if v is not None and v != ()}
            run(kind(**keeping_given(kind, {**in_file, **on_line}, on_line)), context)

        super().__init__(
            kind.command,
            params=[*map(_parameter, options), _config_option()],
            callback=call,
            help=text,
            epilog=f"For example: prism {kind.command} {example}",
            short_help=re.split(r"[.:](?:\s|$)|\s\(|(?<=\?)\s", text)[0],
        )

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """The options in groups; arguments stand among them."""
        records = defaultdict[str, list[tuple[str, str]]](list)
        for parameter in self.get_params(context):
            option = self.options.get(parameter.name or "")
            if option and Mark.ARGUMENT in option.mark:
                records[_title(option)].append((option.name.upper(), option.help))
            elif record := parameter.get_help_record(context):
                records[_title(option)].append(record)
        for title in GROUPS:
            if records[title]:
                with formatter.section(title):
                    formatter.write_dl(records[title])


def _order(option: Option) -> tuple[bool, int]:
    return Mark.ARGUMENT not in option.mark, GROUPS.index(option.group)


def _title(option: Option | None) -> str:
    if option is None:  # --config and --help
        return "Running"
    if Mark.REQUIRED in option.mark:
        return NEEDED
    return RARE if Mark.RARE in option.mark else option.group


def _config_option() -> click.Option:
    return click.Option(["--config"], help="TOML file that sets any option; the command line wins.")


def _parameter(option: Option) -> click.Parameter:
    flag, many = flag_of(option.name), option.kind == Sequence[str]
    if Mark.ARGUMENT in option.mark:
        return click.Argument([option.name], required=False, nargs=-1 if many else 1)
    if option.kind is bool:
        names = [f"{flag}/--no-{flag.removeprefix('--')}", option.name]
        return click.Option(names, default=None, help=option.help)

    def complete(
        context: click.Context, parameter: click.Parameter, start: str
    ) -> list[CompletionItem]:
        if Mark.PATH in option.mark:
            return [CompletionItem(start, type="file")]
        return [CompletionItem(value) for value in option.choices if value.startswith(start)]

    return click.Option(
        [flag, option.name],
        type=option.kind if option.kind in (int, float) else str,
        default=None,
        multiple=many,
        help=_help(option),
        shell_complete=complete,
    )


def _help(option: Option) -> str:
    """The help text, with the choices and the default."""
    text = option.help
    if option.choices:
        text += f" One of {', '.join(option.choices)}."
    if option.default not in (None, ()):
        text += f"  [default: {option.default}]"
    return text
