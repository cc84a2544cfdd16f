"""Parts of tools/bench_dit.py that need no model: every attention backend, and the kernels by how they are cut up."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from engine.models import load_model
from ipc.architecture import TransformerConfig
from ipc.messages.names import KernelKind
from ipc.tensors import dtype_of
from stages import kernels
from stages.attention.backends import Case
from stages.attention.choice import best, survey
from tools.gpu_timing import Card, milliseconds
from tools.make_checkpoint import shrink

MODELS = {"1.3b": "wan2.1-t2v-1.3b", "14b": "wan2.1-t2v-14b"}


class Setup(NamedTuple):
    """What every part is given."""

    device: str
    say: Callable[[str], None]
    check: Callable[[bool, str], None]
    card: Card
    attention: str
    """Backend, or auto."""
    rounds: int | None
    compiled: bool


def config_of(name: str, device: str) -> TransformerConfig:
    model = load_model(MODELS[name])
    return (model if device.startswith("cuda") else shrink(model)).transformer


def attention_table(setup: Setup) -> None:
    """Every backend, at the heads of both models."""
    dtype = "bfloat16" if setup.device.startswith("cuda") else "float32"
    for name in MODELS:
        config = config_of(name, setup.device)
        case = Case(torch.device(setup.device), dtype_of(dtype), config.attention_head_dim)
        found = survey(case, config.num_attention_heads, with_lse=True)
        setup.say(f"{config.num_attention_heads} heads of {config.attention_head_dim}, {dtype}: auto is {best(found)}")
        for e in found:
            figures = "" if e.error is None else f"error {e.error:.1e}, lse {e.lse_error:.1e}, "
            times = "" if e.milliseconds is None else f"{e.milliseconds:.3f} ms, "
            setup.say(f"  {e.backend:13} {figures}{times}{e.problem or 'right'} {e.version}")


def kernel_sweep(setup: Setup) -> None:
    """GB/s of the kernels by how they are cut up, and GELU in the product's epilogue against after it."""
    if not setup.device.startswith("cuda"):
        setup.say("kernels are swept on a GPU")
        return
    from stages.kernels import fused

    for heads in (12, 40):
        dim, tokens = heads * 128, 32760
        problem = kernels.check(torch.device(setup.device), torch.bfloat16, heads, 128)
        setup.check(not problem, f"kernels at width {dim}: {problem or 'right'}")
        x = torch.randn(1, tokens, dim, device=setup.device)
        branch, qkv = x.bfloat16(), torch.randn(1, tokens, 3 * dim, device=setup.device).bfloat16()
        table = torch.randn(1, 6, dim, device=setup.device)
        gate, scale, shift = (table[:, i : i + 1] / 100 for i in range(3))
        weight, rope = torch.ones(dim, device=setup.device), torch.randn(tokens, 64, 2, device=setup.device)
        q = qkv.chunk(3, dim=-1)[0]
        modulated = (x, branch, gate, scale, shift, 1e-6, torch.bfloat16, 1.0)
        rotated = (q, weight, 1e-6, heads, rope)
        for rows, warps in itertools.product((1, 2, 4, 8), (2, 4, 8, 16)):
            cut = fused.Launch(rows, warps)
            figures = [
                _rate("residual", functools.partial(fused.residual_norm, *modulated, cut), tokens * dim * 12, setup),
                _rate("rope", functools.partial(fused.norm_rope, *rotated, cut), tokens * (dim * 4 + 512), setup),
            ]
            mark = " *" if cut == fused.launch(dim) else ""
            setup.say(f"  {dim}: rows {rows}, warps {warps:2}: {', '.join(figures)}{mark}")
        up = (torch.randn(4 * dim, dim, device=setup.device) / dim**0.5).bfloat16()
        bias = torch.randn(4 * dim, device=setup.device).bfloat16()
        kinds: tuple[KernelKind, ...] = ("triton", "torch")
        for kind in kinds:
            call = functools.partial(kernels.linear_gelu, kind, branch, up, bias)
            ms = min(milliseconds(call, setup.device, calls=5) for _ in range(3))
            setup.say(f"  {dim}: product and GELU, {'epilogue' if kind == 'triton' else 'apart'}: {ms:.3f} ms")


def _rate(label: str, call: Callable[[], object], moved: int, setup: Setup) -> str:
    """The best of a few runs, and GB/s of the `moved` bytes."""
    call()
    ms = min(milliseconds(call, setup.device, calls=20) for _ in range(3))
    return f"{label} {ms:.4f} ms {moved / ms / 1e6:.0f} GB/s"
