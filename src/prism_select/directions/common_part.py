"""Common: what both answers of the pairs share, and a direction without it.

    c = ½(C + R)                    the common part, each pair with its weight
    d' = d − (d·c / c·c) c          nothing of it is left

Format, topic and length are the same in both answers of a pair; what remains of them in a
difference of two gradients can still outweigh what tells the answers apart."""

import math
from dataclasses import replace

from prism_select.core.layers import Direction
from prism_select.core.target_gradient import Target, dot, minus, norm

__all__ = ["common_of", "common_part", "without_common"]


def common_of(target: Target) -> Direction:
    return {name: (value + target.rejected[name]) / 2 for name, value in target.chosen.items()}


def common_part(target: Target) -> float:
    """‖½(C + R)‖ / ‖C − R‖: what both answers of a pair share, against what tells them apart."""
    return norm(common_of(target)) / (norm(target.direction) or math.nan)


def without_common(target: Target) -> Target:
    """The same with nothing of the common part in the direction. The chosen half stays as it is, so
    that a score along it keeps its meaning."""
    common, direction = common_of(target), target.direction
    times = dot(direction, common) / (dot(common, common) or 1.0)
    return replace(target, rejected=minus(target.rejected, common, -times))
