"""The kernels in plain torch: what they compute, and how where there is no Triton. Differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def residual_modulate(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`stages.kernels.residual_modulate`; x stays as it was."""
    x = add_gated(x, branch, gate)
    return x, modulate(x, shift, scale, eps).to(dtype)


def residual_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`stages.kernels.residual_layer_norm`; x stays as it was."""
    x = add_gated(x, branch, gate)
    return x, F.layer_norm(x, x.shape[-1:], weight.float(), bias.float(), eps).to(dtype)


def add_gated(x: Tensor, branch: Tensor | None, gate: Tensor | None) -> Tensor:
    """x [B, L, dim] float32 + branch [B, L, dim] times gate [B, S, dim] float32; None: nothing to add, no gate."""
    if branch is None:
        return x
    if gate is None:
        return x + branch
    return x + (branch.unflatten(1, (gate.shape[1], -1)) * gate.unsqueeze(2)).flatten(1, 2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights, then * (1 + scale) + shift. x [B, L, dim]; shift, scale [B, S, dim]; float32."""
    x = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (shift.shape[1], -1))
    return (x * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2)


def norm_rope(x: Tensor, weight: Tensor, eps: float, heads: int, rope: Tensor | None) -> Tensor:
    """`stages.kernels.norm_rope`; x stays as it was."""
    y = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).unflatten(-1, (heads, -1))
    return (y if rope is None else rotate(y, rope)).to(x.dtype)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of x [B, L, heads, head_dim] float32 by the table's angles."""
    cos, sin = rope.unsqueeze(1).unbind(-1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
