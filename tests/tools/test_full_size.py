"""The runs for a GPU, on the CPU with shrunken models: the same code from the checkpoint to the summary."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import full_size_setup
from tools.full_size_setup import Report, Workplace

ROOT = Path(__file__).parents[2]


def run(directory: Path, *runs: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.full_size", *runs, "--shrink", "--device", "cpu"]
    where = ["--work", str(directory / "work"), "--out", str(directory / "out")]
    return subprocess.run([*command, *where], cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)


def test_runs_of_shrunken_models(tmp_path: Path) -> None:
    """Two experts from a picture through a real server and real clients, the precision of the forward, and the times of
    loading: every check passes, and each run leaves its text, which names no directory of this machine."""
    ran = run(tmp_path, "i2v-a14b", "precision-1.3b", "load")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    texts = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert sorted(texts) == ["full-size-i2v-a14b.txt", "full-size-load.txt", "full-size-precision-1.3b.txt"]
    for text in texts.values():
        assert text.startswith("$ python -m tools.full_size ")
        assert "torch 2." in text
        assert str(tmp_path) not in text
    experts = texts["full-size-i2v-a14b.txt"]
    assert "timesteps and experts: 999 high, 937 high, 833 low, 624 low" in experts
    assert "seconds of text" in experts
    assert "ok   the low-noise expert's guidance scale changes the video" in experts
    assert "relative error" in texts["full-size-precision-1.3b.txt"]
    assert "transformer, 0.00 GB, cold" in texts["full-size-load.txt"]
    assert "i2v-a14b         9 of 9 checks passed" in ran.stdout


def test_a_run_that_fails(tmp_path: Path) -> None:
    """A checkpoint that lacks its VAE: the server does not come up, the run's last check says why, and so does the exit
    status; the run after it is made all the same."""
    (tmp_path / "work" / "wan2.2-ti2v-5b" / "transformer").mkdir(parents=True)
    ran = run(tmp_path, "ti2v-5b", "precision-14b")
    assert ran.returncode == 1
    assert "0 of 1 checks passed" in ran.stdout
    assert "FAIL RuntimeError: engine serve did not come up: engine: the checkpoint lacks" in ran.stdout
    assert "precision-14b    2 of 2 checks passed" in ran.stdout


def test_room_is_made_for_the_next_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the next model's checkpoint does not fit beside the others, they go, but for the networks that it has too;
    where it fits, they stay."""
    place, report = Workplace(tmp_path, True, "cpu"), Report("test", None, tmp_path)
    first, second = (place.checkpoint(report, f"wan2.1-{kind}") for kind in ("i2v-14b-480p", "t2v-14b"))
    assert first is not None
    assert second is not None
    assert first.is_dir()
    vae = next((first / "vae").glob("*.safetensors")).stat().st_ino
    monkeypatch.setattr(full_size_setup, "SPARE", 1 << 60)
    third = place.checkpoint(report, "wan2.2-t2v-a14b")
    assert third is not None
    assert not first.is_dir()
    assert not second.is_dir()
    assert next((third / "vae").glob("*.safetensors")).stat().st_ino == vae
    high, low = (next((third / name).glob("*.safetensors")).stat() for name in ("transformer", "transformer_2"))
    assert high.st_ino == low.st_ino
