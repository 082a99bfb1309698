"""Columns: which columns of a file nothing reads, and which of them should not go unnoticed.

    pool.jsonl    prompt, completion, topic, weight    →    not read: topic, weight
                                                            weight: a warning

Choices made here:
- the columns of all rows count, not those of the first row alone; an empty cell has nothing that
  could be read;
- an unread column is no error: a chosen row is copied with all that it has;
- a column with a name that trainers know becomes a warning.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from prism_select.data.fields import Fields, Names, columns_of, is_blank
from prism_select.data.formats import Format, fields_read
from prism_select.data.messages import unread_keys
from prism_select.data.records import Raw

__all__ = ["UnreadColumns", "column_warnings", "format_line", "in_words"]

MESSAGES = {"messages", "conversations", "prompt", "completion", "chosen", "rejected"}
NAMES = 1000  # of a file: a key of its own in each row must not fill the memory
SHOWN = 20
_PER_MESSAGE = "no row counts more or less than another; a message may have weight or train"
_UNSEEN = "a model of text cannot see it"
# columns that trainers read, and what to do about them here
HEEDED: Mapping[str, str] = {
    **dict.fromkeys(("system", "history", "tools"), "a bare text takes none; give a prompt"),
    **dict.fromkeys(("system_prompt", "system_message"), "if it is one, --fields system={}"),
    **dict.fromkeys(("chat_history", "previous_turns"), "if it is one, --fields history={}"),
    "functions": "if they are tools, --fields tools={}",
    "input": "only an instruction takes one; put it into the prompt",
    "context": "put it into the prompt; with an instruction, --fields input={}",
    **dict.fromkeys(("weight", "weights", "sample_weight", "loss_weight"), _PER_MESSAGE),
    **dict.fromkeys(("train", "mask", "loss_mask", "train_on_inputs"), _PER_MESSAGE),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "put it into the answer"),
    **dict.fromkeys(("image", "video", "audio"), _UNSEEN),
    "kto_tag": "leave out the rows that it calls bad",
    **dict.fromkeys(("documents", "chat_template_kwargs"), "the chat template does not get it"),
}


@dataclass
class UnreadColumns:
    """Collects the columns that nothing reads, by file, in the order in which they come up.
    `detect` is `detect_pool` or `detect_target`."""

    mapping: Names
    detect: Callable[[Fields, Names, str, int], Format]
    by_file: dict[str, list[str]] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    _seen: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = [self.mapping.get(name, (name,)) for name in MESSAGES]
        self._messages = sorted({name for names in columns for name in names})

    def add(self, raw: Raw) -> None:
        """Raises BadRow for the first row of a file where it is of no format."""
        fields = raw.fields or {}
        seen = self._seen.get(raw.file)
        if seen is None:
            format = self.detect(fields, self.mapping, raw.file, raw.line)
            self.formats[raw.file] = format.name
            self.by_file[raw.file] = []
            seen = self._seen[raw.file] = _columns_read(fields, self.mapping, format)
        if not fields.keys() <= seen:
            for name, value in fields.items():
                if name not in seen and not is_blank(value) and len(seen) < NAMES:
                    seen.add(name)
                    self.by_file[raw.file].append(name)
        for name in self._messages:
            value = fields.get(name)
            if isinstance(value, list) and len(seen) < NAMES:
                keys = [f"{name}.{key}" for key in unread_keys(value)]
                self.by_file[raw.file] += [key for key in keys if key not in seen]
                seen.update(keys)


def _columns_read(fields: Fields, mapping: Names, format: Format) -> set[str]:
    """The columns of a file that its format reads, by the first row of the file."""
    hidden = columns_of(fields, mapping).keys()
    mapped = {column for columns in mapping.values() for column in columns}
    return {
        *(name for name in fields_read(format) if name not in hidden),
        *mapped,
        *(column.partition(".")[0] for column in mapped),
    }


def in_words(columns: Sequence[str]) -> str:
    """The names, or the first of very many."""
    names, hidden = ", ".join(columns[:SHOWN]), len(columns) - SHOWN
    return f"{names} and {hidden} others" if hidden > 0 else names


def format_line(file: str, format: str, unread: Sequence[str], fate: str = "") -> str:
    """A file with its format, and the columns that are not read, with their `fate`."""
    ignored = f"; not read: {in_words(unread)}" + f" ({fate})" * bool(fate)
    return f"{file}: {format}" + ignored * bool(unread)


def column_warnings(by_file: Mapping[str, Collection[str]]) -> list[str]:
    """A warning for each unread column that a trainer may heed."""
    warnings = list[str]()
    for name, advice in HEEDED.items():
        if files := [file for file, columns in by_file.items() if name in columns]:
            where = files[0]
            if len(files) > 1:
                where += f" and {len(files) - 1} other file{'s' * (len(files) > 2)}"
            warnings.append(
                f"the column {name} of {where} is not read, and a trainer may heed it: "
                + advice.format(name)
            )
    return warnings
