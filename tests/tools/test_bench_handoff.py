from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs_and_writes_its_table(tmp_path: Path) -> None:
    """Two rounds of the smallest tensor: a line per transport and look, on the screen and in the file."""
    out = tmp_path / "handoff.txt"
    command = [sys.executable, "tools/bench_handoff.py", "--rounds", "2", "--sizes", "64 KB", "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for look in ("touch", "read"):
        for transport in ("TensorQueue", "torch Queue", "torch SimpleQueue"):
            assert f"64 KB   {look:<6} {transport}" in run.stdout
    assert out.read_text().endswith(run.stdout)
