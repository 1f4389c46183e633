"""How each diffusers network family is called and conditioned, one small file per family."""
