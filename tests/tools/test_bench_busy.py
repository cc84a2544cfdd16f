"""The measure of how busy a GPU is, on the CPU with the model that ships."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_two_queued_requests(tmp_path: Path) -> None:
    """A share for each device, with one quantum at a time there, and the trace of both requests without the one before
    them."""
    command = [sys.executable, "-m", "tools.bench_busy", "wan-demo", "--requests", "2", "--steps", "4"]
    where = ["--device", "cpu", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    ran = subprocess.run([*command, *where], cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    text = (tmp_path / "busy-wan-demo.txt").read_text()
    assert text.startswith("$ python -m tools.bench_busy wan-demo --requests 2 --steps 4\n")
    shares = [float(share) for share in re.findall(r"cpu:dit: busy for .* s, ([\d.]+)% of the time", text)]
    assert len(shares) == 1 and 1 < shares[0] <= 100 and "ok   cpu:dit: one quantum at a time" in text
    events = json.loads((tmp_path / "busy-wan-demo.json").read_text())["traceEvents"]
    assert len({event["args"]["task"] for event in events if event["ph"] == "X"}) == 2
