"""The kills for a GPU, on the CPU with the model that ships."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_kills_with_a_spare(tmp_path: Path) -> None:
    """A kill, the spare takes the place of the dit: every check passes, and the text says what was done."""
    command = [sys.executable, "-m", "tools.survive", "wan-demo", "--kills", "1", "--steps", "40", "--spare"]
    where = ["--device", "cpu", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    ran = subprocess.run([*command, *where], cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    text = (tmp_path / "survive-wan-demo-spare.txt").read_text()
    assert text.startswith("$ python -m tools.survive wan-demo --kills 1 --steps 40 --spare --seed ")
    assert "ok   kills: 1; the frames are those of the undisturbed run" in text
    assert "memory that outlives: host" in text
    assert text.count("until the next step") == 2
