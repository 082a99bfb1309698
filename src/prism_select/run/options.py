"""TODO."""

import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from prism_select.run.errors import BadOption

__all__ = [
    "Amount",
    "Config",
    "Options",
    "from_toml",
    "parse_number",
    "parse_share",
    "settings",
    "split_names",
    "to_toml",
]


def parse_share(text: str) -> float:
    """Of 5%, 0.05; NaN for what is no share."""
    found = re.fullmatch(r"(\d{1,3}(?:\.\d{1,9})?)%", text.strip())
    return float(found[1]) / 100 if found else math.nan


def parse_number(text: str) -> float:
    """NaN for what is none, or without end."""
    return float(text) if re.fullmatch(r"\s*\d{1,15}(\.\d{1,9})?\s*", text) else math.nan


@dataclass(frozen=True, slots=True)
class Amount:
    """A budget: a share of the rows, a number of rows, of supervised tokens, or every row above zero."""

    kind: Literal["share", "rows", "tokens", "positive"]
    value: float = 0.0

    @classmethod
    def parse(cls, option: str, text: str) -> "Amount":
        compact = text.strip().replace("_", "")
        if compact == "positive":
            return cls("positive")
        if 0 < (share := parse_share(compact)) <= 1:
            return cls("share", share)
        if (found := re.fullmatch(r"(\d{1,15})(tok)?", compact)) and int(found[1]) > 0:
            return cls("tokens" if found[2] else "rows", int(found[1]))
        raise BadOption(
            f"{option} {text}: not an amount; try 5%, 500 (rows), 200000tok (supervised tokens) or positive"
        )


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every command's options have in common."""

    command: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if hint is str:
                object.__setattr__(self, name, str(getattr(self, name)))
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                known = ", ".join(filter(None, map(str, get_args(hint))))
                raise BadOption(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: unknown; try one of {known}"
                )
        seed = getattr(self, "seed", 0)
        if not 0 <= seed < 2**32:
            raise BadOption(f"--seed {seed}: must be between 0 and {2**32 - 1}")


def split_names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def settings(config: Options) -> dict[str, Any]:
    """The options that are not their defaults: what tells one run from another, also after an option was added."""
    return {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if getattr(config, f.name) != f.default
    }


Config = TypeVar("Config", bound=Options)


def to_toml(config: Options) -> str:
    """Strings, numbers and lists of them read the same in JSON and in TOML."""
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(config).items()
    }
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
    return f"# prism {config.command} --config config.toml\n" + "\n".join(lines) + "\n"


def from_toml(kind: type[Config], path: str) -> Mapping[str, Any]:
    """Options of a file, checked against the fields of `kind`. Raises BadOption, with the file's name."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise BadOption(
            f"--config {path}: {why}; it must be a TOML file such as a run folder's config.toml"
        ) from None
    values.pop("fingerprints", None)  # what a run folder's config.toml adds
    known = {field.name: field for field in fields(kind)}
    for name, value in values.items():
        if name not in known:
            near = [f"did you mean {found}?" for found in get_close_matches(name, known, n=1)]
            told = "; ".join(
                [f"unknown option {name!r}", *near, f"known are {', '.join(sorted(known))}"]
            )
            raise BadOption(f"--config {path}: {told}")
        default = known[name].default
        wanted: Sequence[type] = (
            (list, str)
            if default == ()
            else (int, float)
            if type(default) is float
            else (str, int, float)  # an amount may be written as a number
            if type(default) is str
            else (type(default),)
        )
        wrong = isinstance(value, bool) != isinstance(default, bool) or not isinstance(
            value, tuple(wanted)
        )
        if default is not MISSING and wrong:
            raise BadOption(
                f"--config {path}: {name} is {value!r}; it must be of type {wanted[0].__name__}"
            )
    return values
