"""Networks that a method keeps by name for the length of a run: in memory, or on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from .backbones.conditioned import Conditioned
from .denoiser import Denoiser
from .errors import UserError
from .lora import is_adapted, merged, plain_weights
from .samplers import StudentSampler


class Remembered:
    """Networks kept in memory, by name; ``OnDisk`` keeps them for a resumed run."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Tensor]] = {}

    def keep(self, name: str, net: Denoiser) -> None:
        """Remember the weights of ``net`` as ``name``."""
        self.kept[name] = {key: value.clone() for key, value in plain_weights(net.network).items()}

    def publish(self, name: str, net: Denoiser, sampler: StudentSampler) -> None:
        """As ``keep``."""
        self.keep(name, net)

    def put(self, name: str, net: Denoiser) -> None:
        """Give ``net`` the weights kept as ``name``."""
        net.network.load_state_dict(self.kept[name])


class OnDisk:
    """Networks that a method keeps, one safetensors file each, whole or not there.

    Args:
        folder: where they live; created with the first one.
        accelerator: the main process writes, all wait.
        save_adapters: writes a student's adapters and how it samples to a folder, for ``publish``.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        save_adapters: Callable[[Denoiser, StudentSampler, Path], None] | None = None,
    ) -> None:
        self.folder, self.accelerator, self.save_adapters = folder, accelerator, save_adapters
        self._held: dict[int, str] = {}

    def keep(self, name: str, net: Denoiser) -> None:
        """Write the weights of ``net`` as ``name``."""
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            weights = {key: value.contiguous() for key, value in plain_weights(net.network).items()}
            save_file(weights, self._file(name).with_suffix(".tmp"))
            self._file(name).with_suffix(".tmp").replace(self._file(name))
        self.accelerator.wait_for_everyone()

    def publish(self, name: str, net: Denoiser, sampler: StudentSampler) -> None:
        """Write the adapters of ``net`` to the folder ``name``; a network without any is kept whole, as a stock one."""
        if isinstance(net.network, Conditioned):
            net = replace(net, network=cast(Conditioned, merged(net.network)).folded())
        if self.save_adapters is None or not is_adapted(net.network):
            self.keep(name, net)
            return
        if self.accelerator.is_main_process:
            temporary = self.folder / f"{name}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            self.save_adapters(net, sampler, temporary)
            shutil.rmtree(self.folder / name, ignore_errors=True)
            temporary.rename(self.folder / name)
        self.accelerator.wait_for_everyone()

    def put(self, name: str, net: Denoiser) -> None:
        """Give ``net`` the weights kept as ``name``, every one of them; nothing happens where it has them already.

        Raises:
            UserError: the file is gone.
        """
        if self._held.get(id(net.network)) == name:
            return
        if not self._file(name).is_file():
            raise UserError(f"cannot continue: {self._file(name)}, a network that this run kept, is missing")
        net.network.load_state_dict(load_file(self._file(name), device=str(next(net.network.parameters()).device)))
        self._held[id(net.network)] = name

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
