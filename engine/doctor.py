"""`engine doctor`: what this machine would compute with. Tries it in a process of its own, which has torch."""

from __future__ import annotations

from engine.child import NoAnswer, answer_of
from engine.devices import compute_dtype, resolve_devices
from engine.display.tables import print_table
from engine.host_samples import host_sample
from engine.models import load_model
from engine.monitor import how_to_lock
from engine.params import SystemParams
from engine.weight_sizes import transformer_bytes
from ipc.errors import StageFailed
from ipc.messages.doctor import DoctorAsked, DoctorReport, TransfersMeasured

DOCTOR_TIMEOUT = 600.0
"""Seconds to import torch, compile every backend and kernel, and time them."""


def examine(params: SystemParams) -> DoctorReport:
    """Try everything as an engine with these parameters would. Raises `BadConfig`, `StageFailed`."""
    _, (device, *_) = resolve_devices(params)
    model = load_model(params.model)
    dtype = compute_dtype(params, device)
    asked = DoctorAsked(
        device=device, dtype=dtype, transformer=model.transformer,
        block_bytes=transformer_bytes(model.transformer, dtype).block, vae=model.vae,
        attention=params.attention_backend,
    )  # fmt: skip
    try:
        return answer_of("stages.doctor", asked, DoctorReport, DOCTOR_TIMEOUT)
    except NoAnswer as error:
        raise StageFailed(f"the machine could not be examined: {error}") from error


def print_doctor(report: DoctorReport) -> None:
    """The report as a table on stdout."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    print(f"{report.device}: {versions}\n")
    rows = [
        (
            ("* " if entry.backend == report.attention else "  ") + entry.backend,
            entry.version or "-",
            "-" if entry.error is None else f"{entry.error:.1e}",
            "-" if entry.lse_error is None else f"{entry.lse_error:.1e}",
            "-" if entry.milliseconds is None else f"{entry.milliseconds:.2f}",
            entry.problem or "right",
        )
        for entry in report.backends
    ]
    print_table(("attention", "version", "error", "error of lse", "ms", ""), rows)
    print(
        f"\nerrors are from float64; {report.heads} heads of {report.head_dim}, {report.dtype}, {report.tokens} "
        f"tokens; an engine takes {report.attention or 'none of them: what was asked for does not work here'}"
    )
    for what, kind, problem in (
        ("kernels", report.kernels, report.kernels_problem),
        ("VAE's kernels", report.vae_kernels, report.vae_kernels_problem),
    ):
        print(f"{what}: {kind}" + (f": {problem}" if problem else ", right on this device"))
    print(f"streaming of weights: {streaming(report.transfers)}")


def streaming(found: TransfersMeasured) -> str:
    """What it costs here, in a line."""
    if found.problem:
        return f"not measured: {found.problem}"
    rates = f"{found.copy_in / 1e9:.1f} GB/s to the GPU, {found.copy_out / 1e9:.1f} back"
    if found.unlocked:
        return f"{rates}; pages cannot be locked ({found.unlocked}): {how_to_lock(host_sample().memlock)}"
    return (
        f"{rates}; page-locking {found.pinning / 1e9:.1f} GB/s, without {found.copy_in_unlocked / 1e9:.1f} to the GPU; "
        f"memory level 3 costs no time from {found.break_even:,} tokens on"
    )
