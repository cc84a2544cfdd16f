"""A real stage process, driven as the supervisor drives it, but one message at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ipc.channel import Channel
from ipc.counters import ProgressCounter
from ipc.messages.names import StageName
from ipc.messages.reports import AnyStageReport, Chosen, Loading, Placed, PlacingFile, Ready, VaeChosen
from ipc.messages.stage import AnyStageProcessMessage, Stop
from tests.stages.rig import STAGES, Rig

ROOT = Path(__file__).parents[2]
WAIT = 60.0
"""Seconds that anything may take on a busy machine."""


class WorkerProcess:
    """`python -m stages.worker`, or a variation of it, with these stages."""

    def __init__(
        self, rig: Rig, stages: tuple[StageName, ...] = STAGES, module: str = "stages.worker", **fields: Any
    ) -> None:
        self.rig = rig
        self.stages = stages
        self.counter = ProgressCounter.create()
        self.loading: list[Loading] = []
        ours, theirs = Channel.pair()
        with theirs:
            self.popen = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
            )
        self.channel: Channel[AnyStageReport] = Channel(ours, AnyStageReport)
        start = rig.start(stages, **fields)
        self.channel.send(start, [self.counter.fd, *rig.fds(start)], timeout=WAIT)

    def tell(self, message: AnyStageProcessMessage) -> None:
        self.channel.send(message, timeout=WAIT)

    def hear(self) -> AnyStageReport:
        report, fds = self.channel.receive(WAIT)
        if isinstance(report, Placed):
            self.rig.weights.keep("cpu", report.version, *fds)
        return report

    def ask(self, message: AnyStageProcessMessage) -> AnyStageReport:
        """The answer; that a file is being put in place is said before it, and kept in the rig."""
        self.tell(message)
        while isinstance(report := self.hear(), PlacingFile):
            self.rig.placing.append(report.id)
        return report

    def ready(self) -> Ready:
        report = self.loaded()
        assert isinstance(report, Ready), report
        return report

    def loaded(self) -> AnyStageReport:
        """What the process says when it has loaded, or could not; `loading` has what it said on the way, and the rig
        what it has placed and chosen."""
        while isinstance(report := self.hear(), Loading | Placed | Chosen | VaeChosen):
            if isinstance(report, Loading):
                self.loading.append(report)
            elif isinstance(report, Chosen | VaeChosen):
                self.rig.chosen.append(report)
        return report

    def kill(self) -> None:
        """SIGKILL, reap, and give back what it had in hand."""
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait(WAIT)
        self.rig.reclaim(*self.stages)

    def stop(self) -> int:
        """Ask it to leave; its exit status."""
        self.tell(Stop())
        return self.popen.wait(WAIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.popen.kill()
        self.popen.wait(WAIT)
        self.channel.close()
        self.counter.close()
