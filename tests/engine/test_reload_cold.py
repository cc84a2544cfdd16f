"""A reload gives what a start with that checkpoint gives, bit for bit."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from engine import Supervisor
from engine.memory import DECODE_LATENTS
from engine.models import load_model
from ipc.messages.job import Job
from stages.stage import Stage
from tests.conftest import Video
from tests.engine.reloading import FIRST, ask, engine, order, placed, vary, video
from tests.stages.rig import STAGES, Rig, quanta

PAIRS = 10


def cold(checkpoint: Path, job: Job) -> tuple[dict[str, str], str]:
    """Stages that have never seen other weights make this request: fingerprint of the memory of each component, gaps
    and buffers included, and SHA-256 of the frames."""
    import torch

    torch.set_num_threads(1)
    job = msgspec.structs.replace(job, output=str(checkpoint / "cold.mp4"))
    with Rig(checkpoint, load_model("wan-demo")) as rig:
        stages: dict[str, Stage] = {name: rig.load(name) for name in STAGES}
        for stage in stages.values():
            stage.begin(job)
        of_phase = {"text": "text", "denoise": "dit", "decode": "vae", "write": "writer"}
        for run in quanta(job):
            stages[of_phase[run.phase]].step(run)
        for stage in stages.values():
            stage.drop(job.id)
        return {p.version.component: p.version.fingerprint for p in rig.weights}, Video(job.output).sha256


def served(supervisor: Supervisor) -> dict[str, str]:
    """Fingerprint of the memory of each component."""
    return {p.version.component: p.version.fingerprint for p in supervisor._crew.placed}


@pytest.mark.timeout(600)
async def test_a_reload_equals_a_cold_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one variation of the model to the next, all components of it, ten times."""
    monkeypatch.setattr("tests.stages.rig.CHUNK", DECODE_LATENTS)
    made = set()
    async with engine() as supervisor:
        job = supervisor.check(ask(tmp_path / "v.mp4"))
        for number in range(PAIRS):
            checkpoint = vary(tmp_path / str(number), number) if number else FIRST
            if number:
                await supervisor.reload(order(checkpoint, "transformer", "text_encoder", "vae"))
            else:
                checkpoint = tmp_path / "0"
                checkpoint.mkdir()
                for name in ("transformer", "text_encoder", "vae", "tokenizer"):
                    (checkpoint / name).symlink_to(FIRST / name)
            fingerprints, frames = cold(checkpoint, job)
            assert served(supervisor) == fingerprints
            assert await video(supervisor, tmp_path / "v.mp4") == frames, f"variation {number}"
            assert placed(supervisor) == {n: [c] for n, c in supervisor.status().weights.items()}
            made.add(frames)
        assert len(made) == PAIRS, "the variations differ in what they make"
        await supervisor.reload(order(FIRST, "transformer", "text_encoder", "vae"))
        fingerprints, frames = cold(tmp_path / "0", job)
        assert served(supervisor) == fingerprints
        assert await video(supervisor, tmp_path / "v.mp4") == frames, "and back, the tenth pair"
