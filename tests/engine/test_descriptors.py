"""Where descriptors run out, memory and processes are made whole or not at all. Each test lowers the limit of a process
of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PRELUDE = """
import asyncio, os, resource, signal, sys
from engine import Supervisor, UserParams
from engine.memory import EngineMemory
from engine.models import load_model
from engine.process import Body, StageProcess
from ipc.channel import Channel
from ipc.messages.stage import Stop
from tools.load import children

def left():
    return len(os.listdir('/proc/self/fd')), children(os.getpid())

def leave(free):
    '''Take every descriptor but this many; what was taken.'''
    taken = [os.dup(0) for _ in range(64)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1, HARD))
    while True:
        try:
            taken.append(os.dup(0))
        except OSError:
            break
    for _ in range(free):
        os.close(taken.pop())
    return taken

def give_back(taken):
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, HARD))
    for fd in taken:
        os.close(fd)

SOFT, HARD = resource.getrlimit(resource.RLIMIT_NOFILE)
"""


def run(code: str, *arguments: str) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-c", PRELUDE + code, *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def failures(make: str, end: str) -> int:
    """Make it with 0, 1, 2, ... descriptors left; how often there were too few. AssertionError if something stays."""
    return int(
        run(f"""
before, failed = left(), 0
for free in range(60):
    taken = leave(free)
    try:
        made = {make}
    except OSError:
        failed += 1
    else:
        {end}
        del made
    give_back(taken)
    assert left() == before, f'with {{free}} left: {{left()}}, expected {{before}}'
print(failed)
""")
    )


def test_a_process_is_made_whole_or_not_at_all() -> None:
    """With too few descriptors: OSError, and no descriptor or process stays. Nor when one that was made is ended."""
    assert 5 <= failures("Body()", "made.end()") < 60


def test_memory_is_made_whole_or_not_at_all() -> None:
    """The same of the queues and states of an engine."""
    assert 20 <= failures("EngineMemory(load_model('wan-demo'), dits=2)", "made.close()") < 60


def test_what_stays_is_found() -> None:
    """A pair of which the first stays when there is no descriptor for the second."""
    with pytest.raises(AssertionError, match=r"with 1 left: \(\d+, \[\]\), expected"):
        failures("(os.dup(0), os.dup(0))", "os.close(made[0]), os.close(made[1])")


STAGE = """
async def main():
    before, body, ended = left(), Body(), []
    packet = Channel.encode(Stop(), 1)
    taken = leave(0)
    try:
        process = StageProcess(
            body, ('writer',), 1, packet, FDS, lambda *report: None, lambda *end: ended.append(end[1])
        )
        os.kill(process.pid, signal.SIGKILL)
        await asyncio.wait_for(process.exited.wait(), 20)
        print(ended, process.outside)
    except OSError as error:
        print(error.strerror)
    give_back(taken)
    assert left() == before, (left(), before)
asyncio.run(main())
"""


def test_a_spare_becomes_a_stage_without_a_descriptor_to_spare() -> None:
    """No descriptor is left when it is made a stage, nor when somebody kills it: its end is told, and that it was no
    fault of its own."""
    assert run(STAGE.replace("FDS", "[]")) == "[-9] True\n"


def test_a_process_that_cannot_be_told_is_ended() -> None:
    """A descriptor that was to go with `Start` is closed: OSError, and the process is gone."""
    assert run(STAGE.replace("FDS", "[10**6]").replace("Stop(), 1", "Stop(), 2")) == "Bad file descriptor\n"


def test_an_engine_without_descriptors_restarts_its_stage_when_there_are_some(tmp_path: Path) -> None:
    """The dit is killed in the middle of a request while no descriptor is left: it cannot be started, and says so.
    When there are descriptors again it is, and the request is done."""
    code = """
async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)

async def main():
    async with Supervisor() as engine:
        await engine.ready()
        request = asyncio.create_task(engine.generate(UserParams(prompt='a circle', steps=30, output=sys.argv[1])))
        await until(lambda: any(task.step >= 2 for task in engine.tasks() if task.phase == 'denoise'))
        dit = next(stage for stage in engine.status().stages if stage.name == 'dit')
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, HARD))  # not even those that the dead process gives back
        os.kill(dit.pid, signal.SIGKILL)
        states = lambda: {stage.name: stage.state for stage in engine.status().stages}
        await until(lambda: states()['dit'] == 'restarting' and len(engine._scheduler._stages['dit'].deaths) > 0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, HARD))
        running = set(children(os.getpid())) - {engine.status().forks_pid}
        await request
        print(len(running), states()['dit'])
asyncio.run(main())
"""
    assert run(code, str(tmp_path / "v.mp4")) == "3 up\n"
