"""Options: a config's fields as options of a command, and configs as TOML.

    Annotated[str | None, "help text", Mark.MENDABLE]     a field = an option = a key of config.toml

Choices made here:
- a field is the option of the same name, with dashes for underscores; its help text and default
  stand nowhere else;
- None means not given; config.toml leaves the option out;
- a config checks its values when it is made, before anything is read;
- other facts about an option (may it change between two starts of a run?) are marks on its field,
  so there is no list of names to keep in step.
"""

import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from enum import Flag, auto
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from prism_select.run.errors import BadOption

__all__ = [
    "Amount",
    "Config",
    "Mark",
    "Option",
    "Options",
    "flag_of",
    "from_toml",
    "marked",
    "options_of",
    "parse_number",
    "parse_share",
    "settings",
    "split_names",
    "to_toml",
]


class Mark(Flag):
    """Facts about an option besides its value."""

    NONE = 0
    REQUIRED = auto()  # a run needs it: --help shows it first
    RARE = auto()  # --help shows it last
    ARGUMENT = auto()  # a word of its own on the command line, without a flag
    PATH = auto()  # a file or a folder, for completion
    MENDABLE = auto()  # may change between a run and its resumption
    IN_DIRECTION = auto()  # a saved direction was made with it: refused with --direction
    IN_CHOICE = auto()  # read when rows are chosen again from existing scores


@dataclass(frozen=True)
class Option:
    """One option of a command, read off the field of its config."""

    name: str
    kind: Any  # str, int, float, bool, Sequence[str] or a Literal; never optional
    default: Any
    help: str
    mark: Mark
    group: str  # title in --help

    @property
    def choices(self) -> list[str]:
        return list(map(str, get_args(self.kind))) if get_origin(self.kind) is Literal else []


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a command, or a section of them: a command's config inherits from its sections,
    and a function takes the section it reads."""

    command: ClassVar[str] = ""
    group: ClassVar[str] = "Options"

    def __post_init__(self) -> None:
        self.normalise()
        for section in reversed(type(self).__mro__):
            if validate := vars(section).get("validate"):
                validate(self)

    def normalise(self) -> None:
        """Paths become text, and values outside a Literal raise BadOption."""
        for option in options_of(type(self)):
            value = getattr(self, option.name)
            if value is None:
                continue
            if value == "" and option.default is None:  # an empty variable of a shell
                object.__setattr__(self, option.name, None)
            elif option.choices and value not in option.choices:
                raise BadOption(
                    f"{flag_of(option.name)} {value}: unknown; try one of "
                    f"{', '.join(option.choices)}"
                )
            elif option.kind is str:
                object.__setattr__(self, option.name, str(value))
            elif option.kind == Sequence[str]:
                items = (value,) if isinstance(value, str | Path) else value
                object.__setattr__(self, option.name, tuple(filter(None, map(str, items))))

    @property
    def changed(self) -> list[str]:
        """Names of the options with other values than their defaults."""
        return list(settings(self))


Config = TypeVar("Config", bound=Options)


def flag_of(name: str) -> str:
    """`max_length` → `--max-length`."""
    return "--" + name.replace("_", "-")


def options_of(kind: type[Options]) -> Iterator[Option]:
    """The options of a config class, section by section."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint, text, *marks = get_args(hints[field.name])
        mark = marks[0] if marks else Mark.NONE
        group = _section_of(kind, field.name).group
        yield Option(field.name, _without_none(hint), field.default, text, mark, group)


def _section_of(kind: type[Options], name: str) -> type[Options]:
    """The class with the field's declaration."""
    for base in kind.__mro__:
        if issubclass(base, Options) and name in vars(base).get("__annotations__", {}):
            return base
    raise AssertionError(f"{kind.__name__} has no field {name}")


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (UnionType, Union):
        return hint
    return next(kind for kind in get_args(hint) if kind is not NoneType)


def marked(kind: type[Options], mark: Mark) -> frozenset[str]:
    """Names of the options of `kind` with this mark."""
    return frozenset(option.name for option in options_of(kind) if mark in option.mark)


def settings(config: Options) -> dict[str, Any]:
    """The options with other values than their defaults. They identify a run, also after new
    options were added."""
    values = {field.name: (getattr(config, field.name), field.default) for field in fields(config)}
    return {name: value for name, (value, default) in values.items() if value != default}


def parse_share(text: str) -> float:
    """0.05 for 5%; NaN for any other text."""
    match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,9})?)%", text.strip())
    return float(match[1]) / 100 if match else math.nan


def parse_number(text: str) -> float:
    """A finite number from 0 on; NaN for any other text."""
    return float(text) if re.fullmatch(r"\s*\d{1,15}(\.\d{1,9})?\s*", text) else math.nan


def split_names(text: str | None) -> list[str]:
    """Names with commas between, each once."""
    return list(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))


@dataclass(frozen=True, slots=True)
class Amount:
    """A budget: a share of the rows, a number of rows, of supervised tokens, or every row above
    zero."""

    kind: Literal["share", "rows", "tokens", "positive"]
    value: float = 0.0

    @classmethod
    def parse(cls, option: str, text: str) -> "Amount":
        compact = text.strip().replace("_", "")
        if compact == "positive":
            return cls("positive")
        if 0 < (share := parse_share(compact)) <= 1:
            return cls("share", share)
        if (match := re.fullmatch(r"(\d{1,15})(tok)?", compact)) and int(match[1]) > 0:
            return cls("tokens" if match[2] else "rows", int(match[1]))
        raise BadOption(
            f"{option} {text}: not an amount; try 5%, 500 (rows), 200000tok (supervised tokens) or "
            "positive"
        )


def to_toml(config: Options) -> str:
    """Strings, numbers and lists of them read the same in JSON and in TOML."""
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(config).items()
        if value is not None
    }
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
    return f"# prism {config.command} --config config.toml\n" + "\n".join(lines) + "\n"


def from_toml(kind: type[Config], path: str) -> Mapping[str, Any]:
    """Options of a file, checked against the fields of `kind`. Raises BadOption, with the file's
    name."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise BadOption(
            f"--config {path}: {why}; it must be a TOML file such as a run folder's config.toml"
        ) from None
    values.pop("fingerprints", None)  # what a run folder's config.toml adds
    options = {option.name: option for option in options_of(kind)}
    for name, value in values.items():
        if name not in options:
            close = [f"did you mean {match}?" for match in get_close_matches(name, options, n=1)]
            advice = "; ".join([*close, f"known are {', '.join(sorted(options))}"])
            raise BadOption(f"--config {path}: unknown option {name!r}; {advice}")
        types = _toml_types(options[name].kind)
        if isinstance(value, bool) != (bool in types) or not isinstance(value, types):
            raise BadOption(
                f"--config {path}: {name} is {value!r}; it must be of type {types[0].__name__}"
            )
    return values


def _toml_types(kind: Any) -> tuple[type, ...]:
    """The accepted types in TOML; an error names the first."""
    if kind == Sequence[str]:
        return list, str
    if kind is float:
        return float, int
    if kind is str:
        return str, int, float  # an amount may be written as a number
    return (str,) if get_origin(kind) is Literal else (kind,)
