"""The methods, one file each.  To add one: write its file, then name it in the union below."""

from .base import Batch, Loss, Method, Nets, Snapshots, Turn
from .boot import BOOT
from .disback import DisBack
from .dmd import DMD
from .sid import SiD
from .swiftbrush import SwiftBrush

AnyMethod = SiD | DMD | SwiftBrush | DisBack | BOOT

__all__ = [
    "BOOT",
    "DMD",
    "AnyMethod",
    "Batch",
    "DisBack",
    "Loss",
    "Method",
    "Nets",
    "SiD",
    "Snapshots",
    "SwiftBrush",
    "Turn",
]
