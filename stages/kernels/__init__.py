"""What stands between the matrix products of a transformer block, fused: each kernel in Triton, and the same in plain
torch, which says what it computes and runs where Triton does not.

- `residual_modulate`, `residual_layer_norm`: gated residual, LayerNorm, and modulation or weights, in one pass over the
  residual stream;
- `norm_rope`: RMSNorm over the whole width and RoPE, of queries and keys where they are;
- `linear_gelu`: a product with GELU in its epilogue.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ipc.messages.names import KernelKind
from stages.kernels import plain

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
"""Relative L2 distance from the plain version that counts as right: the two may round differently."""


def residual_modulate(
    kind: KernelKind,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x + branch * gate, and its LayerNorm * (1 + scale) + shift in `dtype`.

    x [B, L, dim] float32, which may be overwritten by the sum; branch [B, L, dim] or None: nothing is added; gate
    [B, S, dim] float32 or None: 1; scale, shift [B, S, dim] float32. Row i of S is for the i-th of S equal runs of L.
    Shapes [1, ...] are for all B.
    """
    if kind == "triton":
        from stages.kernels import fused

        return fused.residual_norm(x, branch, gate, scale, shift, eps, dtype, centre=1.0)
    return plain.residual_modulate(x, branch, gate, scale, shift, eps, dtype)


def residual_layer_norm(
    kind: KernelKind,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`residual_modulate` with the weight and bias [dim] of a LayerNorm, in any dtype, in place of a modulation."""
    if kind == "triton":
        from stages.kernels import fused

        scale, shift = (tensor.float().view(1, 1, -1) for tensor in (weight, bias))
        return fused.residual_norm(x, branch, gate, scale, shift, eps, dtype, centre=0.0)
    return plain.residual_layer_norm(x, branch, gate, weight, bias, eps, dtype)


def norm_rope(kind: KernelKind, x: Tensor, weight: Tensor, eps: float, heads: int, rope: Tensor | None) -> Tensor:
    """RMSNorm over the width, then the split in heads, then RoPE: [B, L, dim] -> [B, L, heads, head_dim].

    x may be a view of a fused product, and may be overwritten by the result. weight [dim] in any dtype; rope
    [L, head_dim/2, 2] float32, (cos, sin) of each pair, or None. Computed in float32, rounded once.
    """
    if kind == "triton":
        from stages.kernels import fused

        return fused.norm_rope(x, weight, eps, heads, rope)
    return plain.norm_rope(x, weight, eps, heads, rope)


def linear_gelu(kind: KernelKind, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU (tanh) of x weight^T + bias; x [B, L, in], weight [out, in].

    In the product's epilogue, GELU takes what was not rounded yet: 1.7e-3 from float32 instead of 2.7e-3, and 6.0 ms
    instead of 7.4 for the widest product of a 14B model (H100).
    """
    if kind == "triton" and x.dtype in (torch.bfloat16, torch.float16):
        y = torch.ops.aten._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        return y.unflatten(0, x.shape[:-1])
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def choose(wanted: str, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> tuple[KernelKind, str]:
    """Which kernels to use, and why not Triton's; `wanted`: auto or a kind, which is then taken without a test."""
    if wanted == "torch" or device.type != "cuda":
        return "torch", "" if wanted == "torch" else "needs a GPU"
    if wanted == "triton":
        return "triton", ""
    problem = check(device, dtype, heads, head_dim)
    return ("torch" if problem else "triton"), problem


def check(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> str:
    """What is wrong with the Triton kernels on this device at this width; empty if nothing is."""
    try:
        wrong = _distances(device, dtype, heads, head_dim)
    except Exception as error:  # no Triton, no compiler for it, no support of the device: none of them is used then
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    limit = TOLERANCE[dtype]
    return "; ".join(f"{name} is {d:.1e} from plain torch, expected {limit:.0e}" for name, d in wrong if not d <= limit)


def _distances(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> list[tuple[str, float]]:
    generator = torch.Generator(device).manual_seed(1)
    dim, batch, frames, tokens = heads * head_dim, 2, 3, 3 * 13

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    x, gate, scale, shift = normal(batch, tokens, dim), *(normal(batch, frames, dim) for _ in range(3))
    qkv, weight, rope = normal(batch, tokens, 3 * dim).to(dtype), normal(dim), normal(tokens, head_dim // 2, 2)
    up, bias = (normal(2 * dim, dim) / dim**0.5).to(dtype), normal(2 * dim).to(dtype)
    results: list[list[Tensor]] = []
    kinds: tuple[KernelKind, KernelKind] = ("torch", "triton")
    for kind in kinds:
        branch, q = qkv[..., :dim].clone(), qkv.clone()[..., dim : 2 * dim]
        total, normed = residual_modulate(kind, x.clone(), branch, gate, scale, shift, 1e-6, dtype)
        _, weighted = residual_layer_norm(kind, x.clone(), branch, None, weight, weight, 1e-6, dtype)
        rotated = norm_rope(kind, q, weight, 1e-6, heads, rope)
        results.append([total, normed, weighted, rotated, linear_gelu(kind, branch, up, bias)])
    names = ("the residual", "modulation", "LayerNorm", "RMSNorm and RoPE", "GELU")
    return [
        (name, float((got.double() - expected.double()).norm() / expected.double().norm()))
        for name, expected, got in zip(names, *results, strict=True)
    ]
