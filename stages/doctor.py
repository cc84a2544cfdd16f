"""Tries what a dit and a vae compute with, for `engine doctor`: `python -m stages.doctor`, a `DoctorAsked` on stdin, a
`DoctorReport` on stdout, both JSON.

A process of its own because this needs torch, and because a library may end the process that tries it.
"""

from __future__ import annotations

import contextlib
import sys

import msgspec
import torch

from ipc.errors import BadConfig
from ipc.messages.doctor import DoctorAsked, DoctorReport
from ipc.messages.names import AttentionBackend
from ipc.tensors import dtype_of
from stages import kernels, transfer
from stages.attention import kept
from stages.attention.backends import Case
from stages.attention.choice import TIMED_TOKENS, best, choose, survey
from stages.models import vae_check
from stages.models.transformer import Compute


@torch.inference_mode()
def examine(asked: DoctorAsked) -> DoctorReport:
    """Every backend and kernel at the widths of the transformer and the VAE, and what an engine would take. The next
    one with `auto` takes the attention that is found best here."""
    device, config = torch.device(asked.device), asked.transformer
    versions = {"torch": str(torch.__version__)}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        versions |= {"CUDA": str(torch.version.cuda), "device": torch.cuda.get_device_name(device)}
    dtype, heads, head_dim = dtype_of(asked.dtype), config.num_attention_heads, config.attention_head_dim
    case = Case(device, dtype, head_dim)
    backends = survey(case, heads, with_lse=True)
    chosen: AttentionBackend | None = None
    if asked.attention == "auto" and device.type == "cuda":
        chosen = best(backends)
        kept.remember(case, heads, chosen)
    else:
        with contextlib.suppress(BadConfig):  # the table says why
            chosen = choose(asked.attention, case, heads)
    kind, problem = kernels.choose("auto", device, dtype, heads, head_dim)
    vae_kind, vae_problem = vae_check.choose("auto", asked.vae, device)
    compute = Compute(chosen or "math", kind)
    transfers = transfer.measure(config, asked.block_bytes, dtype, device, compute)
    return DoctorReport(
        device=asked.device, dtype=asked.dtype, heads=heads, head_dim=head_dim, versions=versions,
        tokens=TIMED_TOKENS[device.type], backends=backends, attention=chosen or "", kernels=kind,
        kernels_problem=problem, vae_kernels=vae_kind, vae_kernels_problem=vae_problem, transfers=transfers,
    )  # fmt: skip


def main() -> None:
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=DoctorAsked)
    with contextlib.redirect_stdout(sys.stderr):  # libraries print
        report = examine(asked)
    sys.stdout.buffer.write(msgspec.json.encode(report))


if __name__ == "__main__":
    main()
