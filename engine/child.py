"""Short-lived processes for what the supervisor must not do itself: decode a stranger's file, load a large library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_module(module: str, *arguments: str, given: bytes = b"", timeout: float) -> subprocess.CompletedProcess[bytes]:
    """`python -m module arguments` with `given` on stdin, to its end. Raises TimeoutExpired after killing it.

    `-P`: nothing is imported from the working directory.
    """
    return subprocess.run(
        [sys.executable, "-P", "-m", module, *arguments], input=given, capture_output=True, timeout=timeout,
        env={**os.environ, "PYTHONPATH": python_path()}, check=False,
    )  # fmt: skip


def python_path() -> str:
    """PYTHONPATH for child processes: they must import this very installation, wherever it was found."""
    root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    return root if not inherited else f"{root}{os.pathsep}{inherited}"
