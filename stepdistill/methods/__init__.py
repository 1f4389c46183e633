"""The methods, one file each.  To add one: write its file, then name it in the union below."""

from .base import Batch, Loss, Method, Nets, Snapshots, Turn
from .boot import BOOT
from .disback import DisBack
from .dmd import DMD
from .freeflow import FreeFlow
from .sid import SiD
from .swiftbrush import SwiftBrush
from .tbcm import TBCM
from .tscd import TSCD

AnyMethod = SiD | DMD | SwiftBrush | DisBack | BOOT | TBCM | TSCD | FreeFlow

__all__ = [
    "BOOT",
    "DMD",
    "TBCM",
    "TSCD",
    "AnyMethod",
    "Batch",
    "DisBack",
    "FreeFlow",
    "Loss",
    "Method",
    "Nets",
    "SiD",
    "Snapshots",
    "SwiftBrush",
    "Turn",
]
