"""The loader where the system has no process to spare for the one that reads."""

from __future__ import annotations

import errno
import os

import pytest

from ipc.channel import Channel
from ipc.errors import ServerUnavailable
from ipc.messages.loader import AnyLoaderReport, ReadFailed, ReadLora
from stages.loader import Asked, in_a_process
from tests.stages.rig import TWO_EXPERTS


def test_a_fork_that_is_refused_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what is lacking and what to do, and the loader lives to be asked again."""
    ours, theirs = Channel.pair()
    supervisor: Channel[AnyLoaderReport] = Channel(ours, AnyLoaderReport)
    loader: Channel[Asked] = Channel(theirs, Asked)
    asked = ReadLora(
        supervisor_pid=os.getpid(), files=["none.safetensors"], components=["transformer", "transformer_2"],
        transformer=TWO_EXPERTS.transformer,
    )  # fmt: skip

    def refuse() -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    with monkeypatch.context() as lacking:
        lacking.setattr(os, "fork", refuse)
        in_a_process(asked, loader, [])
    said = supervisor.receive(5.0).message
    assert isinstance(said, ReadFailed) and said.error.code == ServerUnavailable.code
    assert "no process could be started to read the weights" in said.error.message and "ulimit -u" in said.error.message
    in_a_process(asked, loader, [])
    said = supervisor.receive(5.0).message
    assert isinstance(said, ReadFailed) and "none.safetensors cannot be read" in said.error.message
    supervisor.close()
    loader.close()
