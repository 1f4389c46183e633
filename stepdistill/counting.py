"""What a piece of work needs: the most bytes that it holds at one time, and its operations."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry


def measured(run: Callable[[], object], before: list[Tensor], device: torch.device) -> tuple[int, int]:
    """The most bytes on ``device`` that ``run`` holds beside ``before``, and its operations.

    Not by torch's ``FlopCounterMode``, whose hooks keep alive what checkpointing computes again.
    """
    with _Counted(before, device) as counted:
        run()
    return counted.most, counted.flops


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,  # noqa: ANN401
) -> Tensor:
    """Attention as a GPU computes it, without the matrix of all pairs."""
    if not torch.backends.cuda.mem_efficient_sdp_enabled():  # forward mode has asked for the matrix
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:2], query.shape[2], key.shape[2])
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


class _Counted(TorchDispatchMode):
    """Follows every storage from when it is made to when it is freed, and adds up operations."""

    def __init__(self, before: list[Tensor], device: torch.device) -> None:
        super().__init__()
        self.device, self.now, self.most, self.flops = device, 0, 0, 0
        self.known = {each.untyped_storage()._cdata for each in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, made)
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=made)
        return made

    def _see(self, tensor: Tensor) -> None:
        if tensor.device != self.device:
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, which: int, size: int) -> None:
        self.known.discard(which)
        self.now -= size
