"""Which quantum of a task a stage could run now: its inputs are done, the slots it needs are free, and it has not just
failed there for want of memory, and no part of it is being done."""

from __future__ import annotations

from engine.line import Line
from engine.records import Ledger, StageRecord, TaskRecord
from ipc.messages.names import Phase

PREPARED_AHEAD = 1
"""Tasks, and one more for each dit, whose inputs are made before their denoising can begin: enough to keep the dits
busy; the other slots stay free for shorter tasks to come."""


def ready(task: TaskRecord, stage: StageRecord, ledger: Ledger, line: Line) -> Phase | None:
    """The phase of the task's next quantum on this stage, if it could run now."""
    if not stage.up:
        return None
    phase = _next_phase(task, stage, ledger, line)
    if phase is None or task.lacks_memory(phase, stage.level) or (task.in_parts(phase) and task.outstanding(phase)):
        return None
    return phase


def _next_phase(task: TaskRecord, stage: StageRecord, ledger: Ledger, line: Line) -> Phase | None:
    """The same, of a stage that is up and has memory enough."""
    match stage.stage:
        case "text":
            return "text" if not task.granted["text"] and may_prepare(task, ledger, line) else None
        case "dit":
            return "denoise" if may_denoise(task, ledger) else None
        case "vae" if task.granted["encode"] < task.total["encode"]:
            return "encode" if may_prepare(task, ledger, line) else None
        case "vae":
            return "decode" if may_decode(task, ledger) else None
        case "writer":
            return "write" if task.granted["write"] < task.done["decode"] and not task.rewinding else None


def may_prepare(task: TaskRecord, ledger: Ledger, line: Line) -> bool:
    """Slots for all inputs of a task are taken together, or two tasks could each wait for what the other holds. The
    last one is left for a task that goes before all that are prepared."""
    if task.admitted:
        return True
    free = ledger.free("prompts")
    if not free or (task.spec.encode and not ledger.free("init_latents")):
        return False
    before = line.prepared_before(task)
    return before == 0 or (before < PREPARED_AHEAD + ledger.dits and free > 1)


def may_denoise(task: TaskRecord, ledger: Ledger) -> bool:
    """The last step also needs a slot for what it leaves."""
    step, last = task.granted["denoise"], task.total["denoise"] - 1
    return (
        step <= last
        and task.complete("text")
        and task.complete("encode")
        and ledger.has_or_may(task, "states")
        and (step < last or ledger.has_or_may(task, "latents"))
    )


def may_decode(task: TaskRecord, ledger: Ledger) -> bool:
    """A chunk that was granted before, to a process that died, still has its slot."""
    chunk = task.granted["decode"]
    if chunk == task.total["decode"] or task.rewinding or not task.complete("denoise"):
        return False
    return chunk < task.frames_until or ledger.free("frames") > 0
