"""The process that stages are forked from, at the moments at which it is hardest to be without it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine import Supervisor, SystemParams, forks, process
from engine.forks import taking_orphans
from tests.engine.late_forks_worker import SECONDS
from tests.engine.reloading import ask
from tests.engine.test_forks import takes_orphans

pytestmark = pytest.mark.usefixtures("fresh_interpreters")

HOST = """
import asyncio, os, time
from engine import Supervisor, SystemParams

async def main():
    async with Supervisor(SystemParams()) as supervisor:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        print(supervisor.status().forks_pid, child, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_leaves_at_once_with_a_supervisor_that_is_killed() -> None:
    """While it loads, which takes seconds, and though a child of the host has a copy of the channel's other end."""
    host = subprocess.Popen([sys.executable, "-c", HOST], stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    source, child = map(int, host.stdout.readline().split())
    try:
        time.sleep(0.7)  # until it imports torch
        assert lives(source)
        host.kill()
        host.wait()
        end = time.monotonic() + 1.0
        while lives(source) and time.monotonic() < end:
            time.sleep(0.01)
        assert not lives(source) and lives(child)
    finally:
        os.kill(child, 9)
        host.kill()
        host.stdout.close()


async def test_one_that_says_too_late_that_it_has_forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork that nobody knows of hears nothing of what the fresh interpreter in its place is told."""
    monkeypatch.setattr(process, "WORKER", "tests.engine.late_forks_worker")
    monkeypatch.setattr(forks, "FORK_TIMEOUT", SECONDS / 2)
    async with Supervisor(SystemParams(placement="fused")) as supervisor:
        source = supervisor.status().forks_pid
        await asyncio.wait_for(supervisor.generate(ask(tmp_path / "v.mp4")), 120)
        assert supervisor.status().forks_pid != source
        assert {stage.restarts for stage in supervisor.status().stages} == {0}


def test_engines_in_two_threads_do_not_take_it_from_each_other() -> None:
    seen: list[bool] = []

    def forking() -> None:
        for _ in range(50):
            with taking_orphans():
                time.sleep(0.0005)
                seen.append(takes_orphans())

    threads = [threading.Thread(target=forking) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 100 and all(seen)
    assert not takes_orphans()
