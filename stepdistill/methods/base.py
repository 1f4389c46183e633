"""What a distillation method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from ..conditions import Cond
from ..denoiser import Denoiser, Target
from ..process import NoiseProcess
from ..samplers import StudentSampler


@dataclass(frozen=True, eq=False)
class Batch:
    """One data-free batch: noise and conditions; no image unless the run has a ``real_data`` section."""

    noise: Tensor
    """``(B, C, H, W)``, standard normal."""
    cond: Cond = field(default_factory=dict)
    real: Tensor | None = None
    """``(B, C, H, W)`` in [-1, 1]: real images, for a method's adversarial term alone (``Method.takes_images``)."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """What the method itself keeps from step to step; empty at first, part of every checkpoint."""


Nets = Mapping[str, Denoiser]
"""The networks by role: ``teacher`` (frozen), ``student`` and the method's own roles; the one that learns is also
there frozen, as ``still``: the same weights for passes without gradients and for forward-mode derivatives."""


class Loss(NamedTuple):
    """What a turn minimises, and what it wants watched."""

    value: Tensor
    """Scalar; its gradient moves the learner."""
    log: dict[str, Tensor]
    """Detached scalars for the trackers; a NaN among them stops the run under its name."""


class Turn(NamedTuple):
    """Whose weights learn next, and by which loss."""

    role: str
    loss: Callable[[Nets, Batch], Loss]
    update: bool = True
    """The optimizer steps; otherwise the gradient waits for the role's next turn, whose loss it adds to."""


class Snapshots(Protocol):
    """Networks kept by name for the length of a run."""

    def keep(self, name: str, net: Denoiser) -> None:
        """Remember the weights of ``net`` as ``name``."""

    def publish(self, name: str, net: Denoiser, sampler: StudentSampler) -> None:
        """Keep ``net`` as ``name`` for people, as adapters where it is made of them; it is never put back.

        Args:
            name: of a file or folder.
            net: a student on the way.
            sampler: how it generates.
        """

    def put(self, name: str, net: Denoiser) -> None:
        """Give ``net`` the weights kept as ``name``; nothing happens where it has them already."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A distillation method: its hyper-parameters are its fields, its equations its losses."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}
    paper: ClassVar[str]
    """Authors, year and arXiv number."""
    frozen_roles: ClassVar[tuple[str, ...]] = ()
    """Networks that are not trained but given other weights by ``prepare``; copies of the teacher at first."""
    targets: ClassVar[tuple[Target, ...]] = ("eps", "v", "x0", "flow", "edm")
    """Outputs a teacher may have."""
    two_times: ClassVar[bool] = False
    """The student is also told a target time."""
    every_level: ClassVar[bool] = False
    """The student learns at every level from the first on, not at those alone where its sampler asks it."""
    least_batch: ClassVar[int] = 1
    """Samples that a batch needs."""

    @abstractmethod
    def turns(self, step: int) -> Iterator[Turn]:
        """The updates of one training step, in order."""

    def prepare(self, step: int, nets: Nets, snapshots: Snapshots) -> None:  # noqa: B027
        """Before the turns of ``step``: keep networks, or give a frozen one other weights.

        Called again at the first step after a resume, so it depends on ``step`` alone.
        """

    @abstractmethod
    def sampler(self, process: NoiseProcess) -> StudentSampler:
        """How the student of this method generates under the teacher's ``process``."""

    @property
    def roles(self) -> tuple[str, ...]:
        """Networks trained beside the student; each starts as a copy of the teacher."""
        return ()

    @property
    def takes_images(self) -> bool:
        """An adversarial term is on, the only use this package has for real images."""
        return False

    @property
    def judges_conditions(self) -> bool:
        """Its adversarial term also asks whether an image fits its condition, which real ones come without."""
        return False

    @property
    def avoids_forward_mode(self) -> str | None:
        """The setting that spares the student forward-mode derivatives; ``None`` where it takes none."""
        return None

    def fake_scales(self, teacher: Denoiser) -> tuple[float | Tensor | None, ...]:
        """Every guidance scale that another network than ``teacher`` is called with beside it."""
        return ()

    @property
    def least_steps(self) -> int:
        """Steps that a run needs for every phase of the method to take place."""
        return 1

    def typical(self, step: int) -> tuple[int, ...]:
        """Steps from ``step`` on whose costs have the mean of those there."""
        return (step,)

    def check(self, teacher: Denoiser) -> None:
        """Raise ``ValueError`` where this method cannot learn from ``teacher``."""
        if teacher.target not in self.targets:
            raise ValueError(
                f"{type(self).__name__} needs a teacher that predicts {', '.join(self.targets)}, got "
                f"{teacher.target!r}"
                + (" (a consistency function is not a posterior mean)" if teacher.target == "consistency" else "")
            )
