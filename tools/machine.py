"""What a benchmark ran on, for its output."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cpu_name() -> str:
    """As the kernel calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def host_line() -> str:
    """CPU, cores, kernel and interpreter."""
    return (
        f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}; "
        f"Python {platform.python_version()}"
    )
