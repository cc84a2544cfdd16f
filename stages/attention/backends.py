"""softmax(q k^T / sqrt(head_dim)) v without a mask, by several implementations. All of them are exact attention.

Layout of every tensor: [B, L, heads, head_dim] ("BSHD"), the last dim contiguous, else of any strides: views of a fused
product of q, k and v need no copy. The log-sum-exp is that of the scaled scores, natural, [B, heads, L] float32 (of
float64 inputs, float64); two results over different keys are joined with it.

Which of them works here is not decided by what a library says of itself, but by `stages/attention/choice.py`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ipc.messages.names import AttentionBackend
from stages import cache

MATH_SCORES = 1 << 26
"""Scores that `math` holds at a time: 256 MiB in float32."""

Result = tuple[Tensor, Tensor | None]
"""Output [B, L, heads, head_dim], and the log-sum-exp if it was asked for."""


class Case(NamedTuple):
    """What a backend is asked to do."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int


class Implementation(NamedTuple):
    """One backend."""

    run: Callable[[Tensor, Tensor, Tensor, bool], Result]
    missing: Callable[[Case], str]
    """Why it cannot be tried at all; empty if it can."""
    version: Callable[[], str]
    """Of the library it is from."""


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend, *, return_lse: Literal[False] = False
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend, *, return_lse: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend, *, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(head_dim)) v. q [B, L, heads, head_dim]; k, v [B, M, heads, head_dim] -> as q, in its dtype;
    with `return_lse` also the log-sum-exp of the scaled scores, [B, heads, L] float32."""
    out, lse = IMPLEMENTATIONS[backend].run(q, k, v, return_lse)
    if not return_lse:
        return out
    assert lse is not None, f"{backend} returned no log-sum-exp"
    return out, lse if lse.dtype == torch.float64 else lse.float()


# The libraries of the FlashAttention project: BSHD is their own layout.


@functools.cache
def _flash4() -> Callable[..., Any]:
    """What it compiles is kept, as that takes a new process longer than all the rest of its start; in the user's own
    directory, as the library's is one below /tmp that others can write to. What the environment says goes before."""
    if (kept := cache.directory()) is not None:
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(kept / "flash-attention-4"))
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    from flash_attn.cute.interface import _flash_attn_fwd

    return _flash_attn_fwd


@functools.cache
def _flash3() -> Callable[..., Any]:
    from flash_attn_interface import flash_attn_func

    return flash_attn_func


@functools.cache
def _flash2() -> Callable[..., Any]:
    from flash_attn import flash_attn_func

    return flash_attn_func


def _run_flash4(q: Tensor, k: Tensor, v: Tensor, lse: bool) -> Result:
    # Below flash_attn_func, which is an autograd function around this.
    result = _flash4()(q, k, v, return_lse=lse)
    return result[0], result[1] if lse else None


def _run_flash3(q: Tensor, k: Tensor, v: Tensor, lse: bool) -> Result:
    # Versions differ in whether the log-sum-exp comes unasked.
    result = _flash3()(q, k, v, return_attn_probs=True) if lse else _flash3()(q, k, v)
    return (result[0], result[1] if lse else None) if isinstance(result, tuple) else (result, None)


def _run_flash2(q: Tensor, k: Tensor, v: Tensor, lse: bool) -> Result:
    if not lse:
        return _flash2()(q, k, v), None
    out, sums, _ = _flash2()(q, k, v, return_attn_probs=True)
    return out, sums


# The operators behind torch's scaled_dot_product_attention, one by one: which one runs is our choice, not torch's.
# They want [B, heads, L, head_dim] of any strides.


def _run_cudnn(q: Tensor, k: Tensor, v: Tensor, lse: bool) -> Result:
    if q.shape[1] == 1 or k.shape[1] == 1:  # torch keeps those from cuDNN
        return _run_math(q, k, v, lse)
    out, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*_heads_first(q, k, v), None, lse)
    return out.transpose(1, 2), sums.reshape(len(q), q.shape[2], q.shape[1]) if lse else None


def _run_flash(q: Tensor, k: Tensor, v: Tensor, lse: bool) -> Result:
    out, sums, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*_heads_first(q, k, v))
    return out.transpose(1, 2), sums if lse else None


def _run_efficient(q: Tensor, k: Tensor, v: Tensor, lse: bool) -> Result:
    out, sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(*_heads_first(q, k, v), None, lse)
    return out.transpose(1, 2), sums[:, :, : q.shape[1]] if lse else None  # the kernel pads its rows


def _run_sdpa(q: Tensor, k: Tensor, v: Tensor, lse: bool) -> Result:
    """The operator that torch chooses itself: on a CPU, the one that is there."""
    if not lse:
        return F.scaled_dot_product_attention(*_heads_first(q, k, v)).transpose(1, 2), None
    if q.device.type != "cpu":
        return _run_efficient(q, k, v, lse)
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(q, k, v))
    return out.transpose(1, 2), sums


def _run_math(q: Tensor, k: Tensor, v: Tensor, lse: bool) -> Result:
    """As written in the books, in float32 (of float64, in float64), some rows of q at a time."""
    dtype, exact = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(exact) for x in _heads_first(q, k, v))
    rows = max(1, MATH_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    outs, sums = [], []
    for part in q.split(rows, dim=2):
        scores = part @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        sums.append(scores.logsumexp(dim=-1))
        outs.append((scores - sums[-1].unsqueeze(-1)).exp() @ v)
    return torch.cat(outs, dim=2).transpose(1, 2).to(dtype), torch.cat(sums, dim=2) if lse else None


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


# Whether there is something to try.

HALF = (torch.bfloat16, torch.float16)


def _library(load: Callable[[], object], capability: int) -> Callable[[Case], str]:
    """A library that needs a GPU of this compute capability (times ten) and half precision."""

    def missing(case: Case) -> str:
        if (problem := _needs_gpu(case)) or (problem := _needs_half(case)):
            return problem
        major, minor = torch.cuda.get_device_capability(case.device)
        if 10 * major + minor < capability:
            return f"needs compute capability {capability / 10:.1f}, this is {major}.{minor}"
        try:
            load()
        except Exception as error:  # a library that is half there fails in its own ways
            return f"not installed ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]})"
        return ""

    return missing


def _torch_says(name: str) -> Callable[[Case], str]:
    """An operator of torch, which can say whether it takes such tensors."""

    def missing(case: Case) -> str:
        if problem := _needs_gpu(case):
            return problem
        x = torch.empty(1, 2, 64, case.head_dim, dtype=case.dtype, device=case.device)
        params = torch.backends.cuda.SDPAParams(x, x, x, None, 0.0, False, False)
        return "" if getattr(torch.backends.cuda, name)(params, False) else "torch does not have it for these tensors"

    return missing


def _needs_gpu(case: Case) -> str:
    return "" if case.device.type == "cuda" else "needs a GPU"


def _needs_half(case: Case) -> str:
    if case.dtype not in HALF:
        return f"needs bfloat16 or float16, not {str(case.dtype).removeprefix('torch.')}"
    return f"needs a head_dim that is a multiple of 8, not {case.head_dim}" if case.head_dim % 8 else ""


def _needs_cpu(case: Case) -> str:
    return "" if case.device.type == "cpu" else "would be one of the others, as torch likes"


def _distribution(*names: str) -> Callable[[], str]:
    def version() -> str:
        for name in names:
            try:
                return f"{name} {importlib.metadata.version(name)}"
            except importlib.metadata.PackageNotFoundError:
                continue
        return names[0]

    return version


def _torch_version() -> str:
    return f"torch {torch.__version__}"


def _cudnn_version() -> str:
    return f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"


IMPLEMENTATIONS: Mapping[AttentionBackend, Implementation] = {
    "flash-attn-4": Implementation(_run_flash4, _library(_flash4, 90), _distribution("flash-attn-4")),
    "flash-attn-3": Implementation(_run_flash3, _library(_flash3, 90), _distribution("flash-attn-3", "flash_attn_3")),
    "cudnn": Implementation(_run_cudnn, _torch_says("can_use_cudnn_attention"), _cudnn_version),
    "flash-attn-2": Implementation(_run_flash2, _library(_flash2, 80), _distribution("flash-attn")),
    "flash": Implementation(_run_flash, _torch_says("can_use_flash_attention"), _torch_version),
    "efficient": Implementation(_run_efficient, _torch_says("can_use_efficient_attention"), _torch_version),
    "sdpa": Implementation(_run_sdpa, _needs_cpu, _torch_version),
    "math": Implementation(_run_math, lambda case: "", _torch_version),
}
"""In the order of preference: as far as measured (H100), the order of speed."""
