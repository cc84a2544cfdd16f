"""An engine with nothing to do looks through its accounts."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from engine import Supervisor, SystemParams, UserParams, supervisor as module
from ipc.state import _STATE, _word

Wait = Callable[..., Awaitable[None]]


async def test_broken_accounts_are_found_when_idle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    """After a request nothing is wrong and nothing is said. With a state slot whose header makes no sense, the log says
    so after the next request, which is done all the same."""
    monkeypatch.setattr(module, "IDLE_CHECK", 0.1)
    looks = []

    class Watched(Supervisor):
        def check_integrity(self) -> list[str]:
            looks.append(super().check_integrity())
            return looks[-1]

    request = {"prompt": "a circle", "height": 32, "width": 32, "num_frames": 1, "steps": 1}
    with caplog.at_level(logging.ERROR):
        async with Watched(SystemParams(placement="fused")) as supervisor:
            await supervisor.generate(UserParams(output=str(tmp_path / "a.mp4"), **request))
            await wait_until(lambda: looks, "the first look")
            assert looks[0] == []
            assert "integrity" not in caplog.text
            supervisor._memory.state._words[_word(1, _STATE)] = 7
            await supervisor.generate(UserParams(output=str(tmp_path / "b.mp4"), **request))
            await wait_until(lambda: "integrity: state slot 1: state 7 is neither free nor taken" in caplog.text, "it")
