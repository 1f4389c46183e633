"""The methods, one file each.  To add one: write its file, then name it in the union below."""

from .base import Batch, Loss, Method, Nets, Turn
from .boot import BOOT
from .sid import SiD

AnyMethod = BOOT | SiD

__all__ = ["BOOT", "AnyMethod", "Batch", "Loss", "Method", "Nets", "SiD", "Turn"]
