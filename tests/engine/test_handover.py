"""The document of a hand-over: whole, strict, and of one format."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine import handover
from engine.adapters import Adapters, AdaptersState
from engine.crew import Crew
from engine.device_level import DeviceLevel
from engine.forks import Forks
from engine.handover import FORMAT, Handover, decode, encode, from_memory, in_memory
from engine.journal import Journal
from engine.levels import Levels
from engine.loras import Loras
from engine.memory import EngineMemory
from engine.params import SystemParams, UserParams
from engine.paths import ClaimState, SocketClaim
from engine.plans import Plans
from engine.posts import Post, Posts, PostState
from engine.process import Body, StageProcess
from engine.records import StageRecord, TaskRecord
from engine.reload import Reloader
from engine.requests import Requests
from engine.running import RunningTasks
from engine.scheduler import Scheduler
from engine.scheduler_state import StageRecordState, TaskState
from engine.serve import Service
from engine.server import Server
from engine.session import Session
from engine.spare import Spare
from engine.start_messages import StartMessages
from engine.states import Descriptors
from engine.supervisor import Supervisor
from engine.systemd import Notify
from engine.takeover import Takeover
from engine.tasks import Task, TaskPool
from engine.trace import Trace
from engine.vault import Vault
from engine.weights import Versions, WeightStore
from ipc.errors import ServerUnavailable
from ipc.frames import FrameReader
from ipc.messages.server import AnyServerMessage, Failed, Status
from tests.conftest import until
from tests.engine.adapters import ask, write_adapter
from tests.engine.wire import RawClient, frame

HANDED_OVER: dict[type, tuple[str, str]] = {
    Supervisor: (
        "params model device dit_devices checkpoint _pool _phase _started_at _journal _memory _crew _scheduler _trace "
        "_loras _levels _vault",
        "_closed _timer _loop _running _requests _reloader _resident _handing_over",
    ),
    Requests: (
        "_pool _outputs idle _scheduler _journal _loras",
        "_host _params _model _on_gpu _loop _admitting _no_admissions _background",
    ),
    RunningTasks: ("_pool _scheduler _crew _adapters", "_model _checkpoint"),
    Trace: ("_spans _changes", "_devices _granted"),
    Crew: (
        "_posts placed weights _source versions _loading _epoch _forks _spare _pending _held_back plans _starts",
        "_params _model _checkpoint _memory _owner _loop device on_gpu dtype outliving tokens _stopping upkeep "
        "_takeover _changes _watch _left_to_start",
    ),
    StartMessages: (
        "chosen vae_chosen settings _memory _posts _placed _weights _plans", "_model _checkpoint dtype outliving",
    ),
    Takeover: ("", "_params _posts _starts _all_up _turn _successors ended moving_to"),
    StageProcess: (
        "seats epoch ready outstanding knows asked unlocked memory computes leaving _outbox _body counter _popen "
        "_channel _pidfd pid _killed _oom_kills",
        "_on_report _on_exit _loop _writing outside ended_by exited _seen resident",
    ),
    Body: ("counter popen pidfd channel", "vmstat"),
    Forks: ("_body", "_wanted _deadline _on_settled _loop _ready _unfit _lacking _refusal _giving_up"),
    Spare: ("_body", "_wanted _device _spawned"),
    Posts: ("_posts", "groups"),
    WeightStore: ("_placed", "_doubted on_change"),
    Vault: ("_names _stored", "_notify _given _identities"),
    Plans: ("held copies", "coming limits"),
    Levels: ("_devices", "_host _crew _model _tasks _by_hand _mapping _rungs _budget _host_sampler copies"),
    DeviceLevel: ("device mode last freed", "setting account turn raising looked policy sampler sample said_slow"),
    Loras: ("adapters", "_model _root _known_jobs _keep _turn _closed _taking_back _unfit _to_read"),
    Adapters: ("_named _nameless _absent _parts", "_lent"),
    Versions: ("serving previous pinned sources served", ""),
    Reloader: ("", "_model _params _crew _levels _tasks _try_weights _turns _loader _candidates loading"),
    EngineMemory: ("on_device queues state", ""),
    Journal: ("_ended _claim", "_path _thread _connection _paused _goes_on"),
    TaskPool: ("_tasks _unfinished _ending _ended finished failed", ""),
    Task: (
        "job spec params submitted_at progress seconds metadata weights changes computed ended told", "_changed _row",
    ),
    Scheduler: (
        "_capacity _policy _line _stages _tasks _deadlines _arrivals _ledger", "_seats _devices _sharing _actions",
    ),
    Server: (
        "sessions _listener",
        "supervisor limits drain_asked stop_asked _users _claim _reload _accepting _left _left_at gate turnstile",
    ),
    Session: (
        "following _socket _frames _decoded _pace _rest _unsaid _then _reload_ref _greeted _last_words _follow_first "
        "_ends_said pid _uid",
        "outgoing _supervisor _limits _loop _host _sending _broken _taken_up _complete_by _incoming _calm",
    ),
    SocketClaim: ("path _shared _bound _lock", ""),
    Service: ("supervisor server announced _claim", "notify"),
}  # fmt: skip
"""Class -> what of it goes to the next program, and what is made anew there."""


def attributes(thing: Any) -> set[str]:
    return set(thing.__struct_fields__) if isinstance(thing, msgspec.Struct) else set(vars(thing))


@pytest.fixture
async def service(short_dir: Path) -> AsyncIterator[Service]:
    """A whole engine in this process, whose stages have just been started."""
    params = SystemParams(placement="fused", device="cpu", threads=1, state_dir=str(short_dir / "state"))
    with SocketClaim(short_dir / "engine.sock") as claim:
        service = Service(Supervisor(params, vault=Vault(Notify(None))), claim)
        await service.start()
        try:
            await until(lambda: bool(service.supervisor._crew._posts.processes()), "the first process")
            yield service
        finally:
            await service.supervisor.stop()
            await service.server.stop()


async def test_an_end_that_is_asked_for_beside_a_hand_over(service: Service, wait_until: Any) -> None:
    """It waits until the hand-over has failed, which is undone whole; once it has begun there is no hand-over; and one
    that cannot close the journal is as if there had been none."""
    supervisor = service.supervisor
    await supervisor.ready()
    journal = supervisor._journal
    assert journal is not None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal, "_close", failing)
        with pytest.raises(OSError, match="on purpose"):
            await supervisor.pause()
    assert not journal.is_paused and supervisor.is_serving
    await supervisor.pause()
    stopping = asyncio.create_task(supervisor.stop())
    await wait_until(lambda: not supervisor.is_serving, "the beginning of the end")
    await asyncio.sleep(0.05)
    assert not stopping.done() and journal.is_paused
    later = asyncio.create_task(supervisor.pause())
    await supervisor.unpause()
    with pytest.raises(ServerUnavailable, match="stopping"):
        await asyncio.wait_for(later, 30)
    await asyncio.wait_for(stopping, 30)
    with pytest.raises(ServerUnavailable, match="stopping"):
        await supervisor.pause()


def failing(connection: object) -> None:
    raise OSError("on purpose")


async def with_a_client(service: Service, short_dir: Path) -> RawClient:
    client = await asyncio.to_thread(RawClient, short_dir / "engine.sock")
    await service.supervisor.submit(UserParams(prompt="x", output=str(short_dir / "v.mp4")))
    return client


async def test_nothing_is_forgotten(service: Service, short_dir: Path) -> None:
    """Every attribute of everything that is handed over is either handed over or made anew: who adds one must say
    which, and if it is handed over, raise `FORMAT`."""
    client = await with_a_client(service, short_dir)
    supervisor, server = service.supervisor, service.server
    crew = supervisor._crew
    process = crew._posts.processes()[0]
    task = next(iter(supervisor._pool))
    things: list[Any] = [
        service, supervisor, server, next(iter(server.sessions.values())), crew, process, process._body, crew._spare,
        crew._forks,
        crew._posts, crew.placed, crew.weights, supervisor._reloader, supervisor._memory, supervisor._journal,
        supervisor._pool, task, supervisor._scheduler, supervisor._trace, service._claim, supervisor._loras,
        supervisor._loras.adapters, supervisor._vault, crew.plans, supervisor._levels,
        supervisor._levels._devices["cpu"], supervisor._requests, supervisor._running, crew._starts, crew._takeover,
    ]  # fmt: skip
    assert {type(thing) for thing in things} == set(HANDED_OVER)
    for thing in things:
        handed_over, anew = (set(names.split()) for names in HANDED_OVER[type(thing)])
        assert attributes(thing) == handed_over | anew, type(thing).__name__
        assert not handed_over & anew
    client.close()


@pytest.mark.parametrize(
    ("record", "state", "besides"),
    [(TaskRecord, TaskState, set()), (StageRecord, StageRecordState, set()), (Post, PostState, {"process"})],
)
def test_records_and_their_states_have_the_same_fields(record: Any, state: Any, besides: set[str]) -> None:
    """A field that one has and the other has not would be forgotten."""
    fields = record.__slots__ if hasattr(record, "__slots__") else ()
    names = set(record.__struct_fields__) if issubclass(record, msgspec.Struct) else set(fields)
    assert names - besides == set(state.__struct_fields__)


async def test_a_document_survives_and_a_damaged_one_does_not(service: Service, short_dir: Path) -> None:
    """Encoded and decoded, in a memfd and out of it, it is the same. Of 3,000 with random damage, each is read or is a
    `ValueError`, nothing else; of another format, cut short, or with an unknown field, it is always refused."""
    client = await with_a_client(service, short_dir)
    fds = Descriptors()
    document = service.state(fds, 1.0)
    raw = encode(document)
    memory = in_memory(raw)
    assert from_memory(memory) == raw
    os.close(memory)
    again = decode(raw)
    assert again == document
    assert decode(encode(again)) == document
    assert len(document.server.sessions) == len(document.supervisor.pool.tasks) == 1
    with pytest.raises(ValueError, match=f"format {FORMAT + 1} and this program takes format {FORMAT}"):
        decode(encode(msgspec.structs.replace(document, format=FORMAT + 1)))
    with pytest.raises(ValueError, match="unknown field `surprise`"):
        decode(msgspec.msgpack.encode(msgspec.msgpack.decode(raw) | {"surprise": 1}))
    chance, refused = random.Random(4), 0
    for _ in range(3000):
        damaged = bytearray(raw)
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            assert isinstance(decode(bytes(damaged)), Handover)
        except ValueError:
            refused += 1
    assert refused > 1000
    for _ in range(200):
        with pytest.raises(ValueError):
            decode(raw[: chance.randrange(len(raw))])
    client.close()


async def test_an_end_that_is_not_told_goes_over(service: Service, short_dir: Path, wait_until: Any) -> None:
    """A request ends when the journal is closed for the hand-over: nobody hears of it, and the next program writes it
    down and tells it; so does this one, if there is no next one."""
    supervisor = service.supervisor
    identity = (await supervisor.submit(UserParams(prompt="x", output=str(short_dir / "v.mp4")))).id
    await supervisor.pause()
    cancelling = asyncio.create_task(supervisor.cancel(identity))
    await wait_until(lambda: bool(supervisor._pool.ending()), "the end")
    await asyncio.sleep(0.05)
    assert not cancelling.done()
    fds = Descriptors()
    document = decode(encode(service.state(fds, 1.0)))
    (task,) = document.supervisor.pool.tasks
    assert isinstance(task.ended, Failed) and not task.told
    assert document.supervisor.journal is not None and document.supervisor.journal.ended.keys() == {identity}

    taken = Descriptors([os.dup(fd) for fd in fds.fds])
    journal = Journal(short_dir / "state", document.supervisor.journal, taken)
    pool = TaskPool()
    pool.put_back(document.supervisor.pool)
    requests = Requests(
        supervisor, supervisor.params, supervisor.model, pool, supervisor._scheduler, journal, supervisor._loras, False
    )  # fmt: skip
    assert requests._outputs == {task.job.output} and requests.idle.is_set()
    assert await journal.open() == []
    requests.resume()
    await asyncio.wait_for(pool.get(identity).until_told(), 10)
    assert (pool.failed, pool.get(identity).state, requests._outputs) == (1, "cancelled", set())
    assert [ended.ending.event for ended in await journal.ended()] == [task.ended]
    await requests.close()
    await journal.close()
    for place, fd in enumerate(taken.fds):
        if place != document.supervisor.journal.claim:
            os.close(fd)

    await supervisor.unpause()
    await asyncio.wait_for(cancelling, 10)
    assert supervisor._pool.get(identity).state == "cancelled"


async def test_what_is_unsent_goes_over(service: Service, short_dir: Path, wait_until: Any) -> None:
    """A client asks and does not read: the rest of the answer that fills its socket is in its state, to the byte."""
    client = await asyncio.to_thread(RawClient, short_dir / "engine.sock")
    (session,) = service.server.sessions.values()
    client.socket.setblocking(False)
    client.send(frame(type="status", ref=7, memory=True) * 250)
    await wait_until(lambda: session.outgoing > 0, "an answer that waits to be read")
    await asyncio.sleep(0.05)
    state = session.state(Descriptors())
    assert 0 < len(state.unsent) <= session.outgoing
    received, complete = b"", FrameReader[AnyServerMessage](AnyServerMessage)
    with contextlib.suppress(BlockingIOError):
        while data := client.socket.recv(1 << 20):
            received += data
    answers = list(complete.feed(received + state.unsent))
    assert not complete.unfinished
    assert {(type(answer), answer.ref) for answer in answers} == {(Status, 7)}
    client.close()


def test_a_document_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its length is looked at before it is read."""
    monkeypatch.setattr(handover, "MAX_DOCUMENT", 10)
    memory = in_memory(b"12345678901")
    with open(memory, "rb"), pytest.raises(ValueError, match="11 bytes; expected at most 10"):
        from_memory(memory)


def test_descriptors_are_taken_once_and_all() -> None:
    """A place that is taken twice, or is not there, or that nobody takes, is an error: something would be lost."""
    with open("/dev/null", "rb") as file:
        given = Descriptors()
        assert given.put_all([file.fileno()] * 2) == [0, 1]
        taken = Descriptors(given.fds)
        assert taken.take(1) == file.fileno()
        for place in (1, 2, -1):
            with pytest.raises(ValueError, match=f"descriptor {place} of 2"):
                taken.take(place)
        with pytest.raises(ValueError, match="1 of 2 descriptors"):
            taken.check_all_taken()
        taken.take(0)
        taken.check_all_taken()


def test_a_claim_is_the_same_claim(short_dir: Path) -> None:
    """Under the next program nobody else can take the path, and at its end the socket is gone."""
    claim = SocketClaim(short_dir / "engine.sock")
    listener = claim.bind()
    fds = Descriptors()
    state = msgspec.msgpack.decode(msgspec.msgpack.encode(claim.state(fds)), type=ClaimState)
    next_claim = SocketClaim.restored(state, Descriptors(fds.fds))
    with pytest.raises(Exception, match="already running"):
        SocketClaim(short_dir / "engine.sock")
    next_claim.close()
    listener.close()
    assert not (short_dir / "engine.sock").exists()
    SocketClaim(short_dir / "engine.sock").close()


async def test_adapters_go_over(service: Service, short_dir: Path) -> None:
    """Names, what was replaced and is used, and the memory of both; a request finds them in the next program."""
    supervisor = service.supervisor
    for seed in (1, 2):
        file = write_adapter(short_dir / f"{seed}.safetensors", seed, 2)
        await supervisor.add_lora("x", str(file))
        await supervisor.submit(ask(short_dir / f"{seed}.mp4", "x", steps=1000, num_frames=33, height=96, width=96))
    before, jobs = supervisor._loras.adapters, [task.job for task in supervisor._pool.unfinished()]
    fds = Descriptors()
    state = msgspec.msgpack.decode(msgspec.msgpack.encode(before.state(fds)), type=AdaptersState)
    after = Adapters()
    after.put_back(state, Descriptors([os.dup(fd) for fd in fds.fds]))
    assert after.infos(jobs) == before.infos(jobs)
    assert [info.state for info in after.infos(jobs)] == ["loaded", "draining"]
    for job in jobs:
        assert not after.missing(job)
        ((version, fd),) = after.of(job)
        assert os.fstat(fd).st_size == version.bytes
    after.close()
    lacking = msgspec.structs.replace(state, parts=[], fds=[])
    with pytest.raises(ValueError, match="without its memory"):
        Adapters().put_back(lacking, Descriptors())
