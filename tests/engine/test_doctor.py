"""`engine doctor`: what this machine computes with, on a CPU."""

from __future__ import annotations

import json

import pytest

from engine.doctor import examine, print_doctor, streaming
from engine.params import SystemParams
from ipc.messages.doctor import DoctorReport, TransfersMeasured
from tests.engine.wire import run_engine

PARAMS = SystemParams(model="wan-demo", device="cpu")


@pytest.fixture(scope="module")
def report() -> DoctorReport:
    return examine(PARAMS)


def test_what_is_there(report: DoctorReport) -> None:
    """Every backend is in the report: right, with its errors and its time, or with the reason why not."""
    right = {entry.backend for entry in report.backends if not entry.problem}
    assert right == {"sdpa", "math"}
    for entry in report.backends:
        measured = (entry.error, entry.lse_error, entry.milliseconds)
        assert all(value is not None for value in measured) if entry.backend in right else entry.problem
    assert (report.attention, report.kernels, report.kernels_problem) == ("sdpa", "torch", "needs a GPU")
    assert (report.vae_kernels, report.vae_kernels_problem) == ("torch", "needs an NVIDIA GPU")
    assert (report.device, report.dtype) == ("cpu", "float32")
    assert report.transfers.problem == "needs a GPU" and not report.transfers.block_seconds


def test_what_is_shown(report: DoctorReport, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each backend, the taken one marked, and the kernels."""
    print_doctor(report)
    out = capsys.readouterr().out
    assert next(line for line in out.splitlines() if line.startswith("*")).split()[:2] == ["*", "sdpa"]
    assert all(entry.backend in out for entry in report.backends)
    assert "an engine takes sdpa" in out and "kernels: torch: needs a GPU" in out
    assert "VAE's kernels: torch: needs an NVIDIA GPU" in out
    assert "streaming of weights: not measured: needs a GPU" in out


def test_what_is_shown_of_transfers() -> None:
    found = TransfersMeasured(
        pinning=7.5e9, copy_in=55.3e9, copy_in_unlocked=5.6e9, copy_out=53e9, break_even=9060
    )  # fmt: skip
    assert streaming(found) == (
        "55.3 GB/s to the GPU, 53.0 back; page-locking 7.5 GB/s, without 5.6 to the GPU; memory level 3 costs no time "
        "from 9,060 tokens on"
    )
    found = TransfersMeasured(
        unlocked="CUDA error 2", copy_in=5.6e9, copy_in_unlocked=5.6e9, copy_out=5e9, break_even=1
    )
    assert streaming(found).startswith("5.6 GB/s to the GPU, 5.0 back; pages cannot be locked (CUDA error 2): ")
    assert "ulimit -l" in streaming(found) and "costs no time" not in streaming(found)


def test_the_command() -> None:
    """JSON on stdout; exit code 2 for a backend that does not work here, or that there is none of."""
    ran = run_engine("doctor", "--device", "cpu", "--model", "wan-demo", "--attention-backend", "cudnn", "--json")
    assert ran.returncode == 2
    assert json.loads(ran.stdout)["attention"] == ""
    ran = run_engine("doctor", "--device", "cpu", "--attention-backend", "fast")
    assert ran.returncode == 2 and "one of auto, " in ran.stderr
