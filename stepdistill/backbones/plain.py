"""A network of the user's own, see ``stepdistill.Plain``: no pipeline is round it, so there is nothing to encode."""

from __future__ import annotations

from torch import Tensor, nn

from ..conditions import Cond
from .family import Family, numbers, square


def call(network: nn.Module, x: Tensor, label: Tensor, cond: Cond) -> Tensor:
    """``(B, C, H, W)`` output for state ``x`` at float network labels ``(B,)``; ``cond`` may hold ``class_labels``."""
    labels = [cond["class_labels"]] if "class_labels" in cond else []
    return network(x, label.float(), *labels, **numbers(cond))


PLAIN = Family(pipelines=(), component="network", network=nn.Module, call=call, shape=square, output="")
