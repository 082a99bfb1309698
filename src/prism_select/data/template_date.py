"""Template date: the day that a chat template takes for today, fixed for a whole run.

    {{ strftime_now("%d %b %Y") }}   → 30 Nov 2026      the day of the run, not of the clock
    {{ date_string }}                → 30 Nov 2026      only where a day was given

Choices made here:
- a template that asks for the time gets midnight of the day, whenever and wherever a run goes on;
- without --template-date it is the day of the run's first start, which config.toml records;
- a template with a day of its own as default (Llama 3.1) keeps it unless a day is given.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date, datetime, time, tzinfo
from typing import Any

__all__ = ["TemplateDate"]

LLAMA_FORMAT = "%d %b %Y"  # of `date_string`, as in its own templates


class TemplateDate:
    """`day` is the ISO date that the tokenizer's chat template sees; None where it asks for none.
    A template that asks for today gets today where no day is given."""

    def __init__(self, tokenizer: Any, day: str | None = None) -> None:
        template = getattr(tokenizer, "chat_template", None) or ""
        text = "\n".join(template.values()) if isinstance(template, Mapping) else str(template)
        self._asks = "strftime_now" in text
        takes = "date_string" in text and not self._asks
        today = date.today().isoformat() if self._asks else None
        self.day = (day or today) if self._asks or takes else None
        self.arguments: Mapping[str, str] = {}
        """Arguments for the template beside the messages."""
        if takes and self.day:
            self.arguments = {"date_string": self._midnight.strftime(LLAMA_FORMAT)}

    @property
    def _midnight(self) -> datetime:
        return datetime.combine(date.fromisoformat(str(self.day)), time())

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """In the block, a template that asks for the time gets that of `day`."""
        if not self._asks:
            yield
            return
        from transformers.utils import chat_template_utils as templates

        midnight, clock = self._midnight, templates.datetime

        class Fixed(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> Any:
                return midnight.replace(tzinfo=tz)

        templates.datetime = Fixed
        try:
            yield
        finally:
            templates.datetime = clock
