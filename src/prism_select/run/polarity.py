"""Polarity: a direction points to the chosen answers of the target file, in repair to the rejected.

    score, select   from rejected to chosen
    repair          from chosen to rejected: a high score marks a harmful row

Choices made here:
- `repair` exchanges the two answers of each pair when pairs are read; the method never knows;
- words for people use the names of the target file, and so need the polarity.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prism_select.run.options import Options

__all__ = ["Polarity"]


@dataclass(frozen=True)
class Polarity:
    """Names of the two answers in the target file: `toward` is the one a direction points to."""

    toward: str = "chosen"
    away: str = "rejected"

    @classmethod
    def of_config(cls, config: Options) -> "Polarity":
        return cls("rejected", "chosen") if config.command == "repair" else cls()

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> "Polarity":
        return cls("rejected", "chosen") if manifest["score"]["swapped"] else cls()

    @property
    def swapped(self) -> bool:
        """Whether pairs are read with their answers exchanged."""
        return self.toward == "rejected"

    @property
    def sign(self) -> int:
        """1 or −1: a score times it is a change towards the chosen answers."""
        return -1 if self.swapped else 1
