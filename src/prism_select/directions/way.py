"""Way: how pairs become a direction, and how rows are ranked along it.

    options of a command → Way → cross-validation, tuning → options

Choices made here:
- `layers` are those of the options' own selection: "all" is all of that;
- curvatures of the pool and of Adam take no part, since pairs alone do not say what they do.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

from prism_select.run.config import BESIDE_PAIRS, ScoreConfig
from prism_select.run.config_pairs import PairsConfig

__all__ = ["Way", "way_of", "with_way"]

Config = TypeVar("Config", bound=ScoreConfig | PairsConfig)


@dataclass(frozen=True, kw_only=True)
class Way:
    """In the words of the options."""

    layers: str = "all"
    likelihood: str = "token"
    weighting: str = "prism"
    anchor: float = 0.0
    curvature: str = "pairs"
    damping: float = 0.1
    common: str = "keep"
    normalize: str = "none"


def way_of(config: ScoreConfig | PairsConfig) -> Way:
    return Way(
        likelihood=config.likelihood,
        weighting=config.weighting,
        anchor=config.anchor,
        curvature="flat" if config.curvature in BESIDE_PAIRS else config.curvature,
        damping=config.dampings[0],
        common=config.common,
        normalize=config.normalize if isinstance(config, ScoreConfig) else "none",
    )


def with_way(config: Config, way: Way, names: Collection[str]) -> Config:
    """The options, those of these names as in `way`."""
    values = asdict(way) | {"damping": f"{way.damping:g}"}
    return replace(config, **{name: values[name] for name in names})
