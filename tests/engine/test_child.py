"""What is said of processes that have ended."""

from __future__ import annotations

import signal
import subprocess

import pytest

from engine.child import how_it_ended


@pytest.mark.parametrize(
    ("number", "says"), [(signal.SIGSEGV, "SIGSEGV"), (signal.SIGKILL, "SIGKILL"), (35, "signal 35")]
)
def test_a_signal_is_named(number: int, says: str) -> None:
    """Also one that has no name of its own."""
    child = subprocess.Popen(["sleep", "60"])
    child.send_signal(number)
    assert how_it_ended(child.wait()) == says


def test_an_exit_code_is_told() -> None:
    """Which has no name."""
    assert how_it_ended(subprocess.run(["sh", "-c", "exit 3"], check=False).returncode) == "exit code 3"
