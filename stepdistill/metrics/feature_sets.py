"""What a set of features must be before it is measured."""

from __future__ import annotations

from torch import Tensor

from ..errors import UserError


def check_features(features: Tensor, name: str, *, least: int = 1) -> None:
    """Refuse what no metric can use.

    Args:
        features: ``(N, d)``, one row a sample.
        name: what errors call them.
        least: the fewest samples.

    Raises:
        UserError: not a matrix, too few samples, or a value that is not finite.
    """
    if features.ndim != 2:
        raise UserError(f"{name} must be (N, d), got shape {tuple(features.shape)}")
    if len(features) < least:
        raise UserError(f"at least {least} {name} are needed, got {len(features)}")
    broken = ~features.isfinite().all(1)
    if broken.any():
        raise UserError(f"{name} must be finite; {int(broken.sum())} are not, first row {int(broken.nonzero()[0])}")


def check_comparable(generated: Tensor, reference: Tensor, *, least: int) -> None:
    """Refuse two sets that are not ``(M, d)`` and ``(N, d)`` features of one network.

    Raises:
        UserError: as ``check_features`` for either, or other dimensions.
    """
    check_features(generated, "generated features", least=least)
    check_features(reference, "reference features", least=least)
    if generated.shape[1] != reference.shape[1]:
        raise UserError(
            f"features must come from one network: got {generated.shape[1]} dimensions against {reference.shape[1]}"
        )


def directions(features: Tensor, name: str) -> Tensor:
    """``(N, d)`` features over their Euclidean norm, float64.

    Raises:
        UserError: one is zero, and has no direction.
    """
    features = features.double()
    norms = features.norm(dim=1, keepdim=True)
    if not norms.all():
        raise UserError(f"{name} must not be zero, row {int((norms == 0).nonzero()[0, 0])} is; its cosine is undefined")
    return features / norms
