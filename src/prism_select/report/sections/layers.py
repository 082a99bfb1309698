"""Layers: the squared norm of the direction, by layer and kind of parameter.

    share = Σ d² of some parameters / Σ d² of all

Choices made here:
- the direction of the chosen answers alone, also in the file, is left out;
- of several targets the squares are added up;
- a direction of more than `READ_BYTES` is not read.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import altair as alt
import numpy as np

from prism_select.report.charts import SERIES, SURFACE, Chart, chart_of, inline_data
from prism_select.report.formatting import percent
from prism_select.report.run_facts import RunFacts
from prism_select.report.sections.section import Section

__all__ = ["SECTION", "LayerFacts", "LayerShare", "layer_shares", "read"]

READ_BYTES = 4 * 2**30
Key = TypeVar("Key")
ROW_HEIGHT, LOW_ROW_HEIGHT, ROWS = 24, 15, 24  # of the chart; lower rows where there are more

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_INSIDE = ("weight", "bias", "default", "base_layer", "lora_A", "lora_B")  # of a module or adapter
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class LayerShare:
    """The share of one kind of parameter of one layer in the direction's squared norm."""

    layer: str
    kind: str
    share: float


@dataclass(frozen=True)
class LayerFacts:
    shares: tuple[LayerShare, ...]

    @property
    def words(self) -> str:
        by_layer = _sums((share.layer, share.share) for share in self.shares)
        largest = sorted(by_layer, key=lambda layer: -by_layer[layer])[:3]
        named = ", ".join(f"{layer} ({percent(by_layer[layer])})" for layer in largest)
        return (
            f"Most of the direction's squared norm lies in {named}. Training would change the "
            "model most there."
        )


def read(run: RunFacts) -> LayerFacts | None:
    """None without a direction, or for a file that is too large."""
    shares = layer_shares(run.path / "direction.safetensors")
    return LayerFacts(shares) if shares else None


def layer_shares(file: Path) -> tuple[LayerShare, ...]:
    """In the order of the network."""
    squares = _squares(file) if file.exists() and file.stat().st_size <= READ_BYTES else {}
    total = sum(squares.values()) or math.nan
    shares = _sums((_layer_and_kind(name), value / total) for name, value in squares.items())
    ordered = sorted(shares, key=lambda key: _position(key[0]))
    return tuple(LayerShare(layer, kind, shares[layer, kind]) for layer, kind in ordered)


def _sums(values: Iterable[tuple[Key, float]]) -> dict[Key, float]:
    sums: dict[Key, float] = {}
    for key, value in values:
        sums[key] = sums.get(key, 0.0) + value
    return sums


def _squares(file: Path) -> dict[str, float]:
    """Σ d² of each parameter over all targets. Read by hand, since numpy has no bfloat16."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    squares: dict[str, float] = {}
    for name, tensor in header.items():
        if name == "__metadata__" or re.match(r"chosen[:/]", name):
            continue
        parameter = name.partition("/")[2] if name.startswith("target:") else name
        start, end = tensor["data_offsets"]
        dtype = np.dtype(_DTYPES[tensor["dtype"]])
        offset = 8 + size + start
        value = np.fromfile(file, dtype, (end - start) // dtype.itemsize, offset=offset)
        if tensor["dtype"] == "BF16":
            value = (value.astype(np.uint32) << 16).view(np.float32)
        square = float(np.square(value, dtype=np.float64).sum())
        squares[parameter] = squares.get(parameter, 0.0) + square
    return squares


def _layer_and_kind(parameter: str) -> tuple[str, str]:
    """`block 3` and the module's own name; a parameter outside of the blocks is its own layer."""
    words = [word for word in parameter.split(".") if word not in _INSIDE] or [parameter]
    block = _BLOCK.search(parameter)
    return (f"block {block[1]}" if block else words[-1], words[-1])


def _position(layer: str) -> tuple[int, int]:
    """Embeddings, blocks, the norms after them, the head."""
    if layer.startswith("block "):
        return 1, int(layer.removeprefix("block "))
    if "emb" in layer or layer in ("wte", "wpe"):
        return 0, 0
    return (3, 0) if "head" in layer else (2, 0)


def charts(facts: LayerFacts) -> list[Chart]:
    """A bar for each layer, made of the kinds of its parameters."""
    by_kind = _sums((share.kind, share.share) for share in facts.shares)
    kinds = sorted(by_kind, key=lambda kind: -by_kind[kind])[: len(SERIES) - 1]
    bars = _sums(
        ((share.layer, share.kind if share.kind in kinds else "other kinds"), share.share)
        for share in facts.shares
    )
    kinds += ["other kinds"] * any(kind == "other kinds" for _, kind in bars)
    sums = _sums((layer, share) for (layer, _), share in bars.items())
    rows = [{"layer": layer, "kind": kind, "share": s} for (layer, kind), s in bars.items()]
    layer_axis = alt.Axis(domain=False, ticks=False)
    share_axis = alt.Axis(format="%", tickCount=6)
    drawn = (
        alt.Chart(inline_data(rows))
        .mark_bar(stroke=SURFACE, strokeWidth=0.5)
        .encode(
            alt.Y("layer:N", sort=list(sums), title=None, axis=layer_axis),
            alt.X("share:Q", title="of the direction's squared norm", axis=share_axis),
            alt.Color(
                "kind:N",
                scale=alt.Scale(domain=kinds, range=SERIES[: len(kinds)]),
                legend=alt.Legend(columns=2),
            ),
            tooltip=["layer:N", "kind:N", alt.Tooltip("share:Q", format=".1%")],
        )
    )
    text = ", ".join(f"{layer} {share:.0%}" for layer, share in sums.items())
    return [
        chart_of(
            "layers",
            "Where the direction lies",
            "Embeddings first, then block by block.",
            f"Share of the direction: {text}.",
            drawn,
            max(90, (ROW_HEIGHT if len(sums) <= ROWS else LOW_ROW_HEIGHT) * len(sums)),
        )
    ]


SECTION = Section("layers", "Layers", "What about layers?", read, charts)
