"""How each diffusers network family is called and conditioned, one small file per family."""

from .dit import DIT
from .family import Family
from .flux import FLUX
from .pixart import PIXART
from .sana import SANA
from .sd3 import SD3
from .stable_diffusion import SD, SDXL
from .unet2d import UNET2D

FAMILIES: tuple[Family, ...] = (UNET2D, SD, SDXL, SD3, PIXART, SANA, FLUX, DIT)
"""Every family that can be distilled; a family added here is loaded, exported and tested."""

__all__ = ["FAMILIES", "Family"]
