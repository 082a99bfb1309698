"""Common part: what both answers of the pairs share, and a direction without it.

    c  = ½(C + R)                   each pair with its weight
    d' = d − (d·c / c·c) c          d' · c = 0

Both answers of a pair share format, topic and length. What a difference of two gradients still has
of them can outweigh what tells the answers apart.
"""

from dataclasses import replace

from prism_select.core.gradients import dot, minus
from prism_select.core.layers import Direction
from prism_select.core.target_gradient import Target

__all__ = ["common_of", "without_common"]


def common_of(target: Target) -> Direction:
    """½(C + R)"""
    return {name: (value + target.rejected[name]) / 2 for name, value in target.chosen.items()}


def without_common(target: Target) -> Target:
    """The target with c projected out of its direction. The chosen half stays as it is, so a score
    along it keeps its meaning."""
    common, direction = common_of(target), target.direction
    times = dot(direction, common) / (dot(common, common) or 1.0)
    return replace(target, rejected=minus(target.rejected, common, -times))
