"""What a result depends on beside the request and the weights, stage by stage: what computes attention, the number of
threads, the libraries. An operator may change the first two while requests run; and which stages share a process,
which no result depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast, get_args

from engine.devices import warn_of_threads
from engine.states import State
from ipc.errors import BadConfig
from ipc.messages.names import AttentionChoice, Placement, StageName

MAX_THREADS = 1024

LIBRARIES: dict[StageName, tuple[str, ...]] = {
    "text": ("torch",), "dit": ("torch", "attention", "kernels"), "vae": ("torch", "vae"), "writer": (),
}  # fmt: skip
"""Of the versions that a process tells, those that each stage's results depend on."""

COMPUTING: tuple[StageName, ...] = ("dit", "vae")
"""Whose number of threads is the operator's: text computes on one, and the writer only writes."""


class Settings(State, frozen=True, kw_only=True):
    """What the processes of an engine are started with from now on."""

    attention: AttentionChoice
    threads: dict[StageName, int]


class Change(NamedTuple):
    """New processes that are asked for, and what they are to be started with; None leaves a setting as it is."""

    stages: Sequence[StageName] = ()
    """In whose places; none: in those of all."""
    attention: AttentionChoice | None = None
    threads: int | None = None
    """0: the default."""
    placement: Placement | None = None


def changed(before: Settings, asked: Change, default_threads: Mapping[StageName, int]) -> Settings:
    """The settings with those of the stages changed. `BadConfig` for a value that is none, or a stage that has no such
    setting."""
    stages, attention, threads, placement = asked
    named = stages or get_args(StageName)
    if placement is not None and set(named) != set(get_args(StageName)):
        raise BadConfig("placement is which stages share a process, and of all of them; name no stage")
    if attention is not None and "dit" not in named:
        raise BadConfig("attention_backend is what the dit computes with; name the stage dit")
    found = dict(before.threads)
    if threads is not None:
        if not 0 <= threads <= MAX_THREADS:
            raise BadConfig(f"threads is {threads}; it must be from 0, the default, to {MAX_THREADS}")
        if not set(COMPUTING) & set(named):
            raise BadConfig(f"threads are of {' and '.join(COMPUTING)}: the other stages have one; name one of these")
        warn_of_threads(threads)
        found |= {stage: threads or default_threads[stage] for stage in COMPUTING if stage in named}
    return Settings(attention=before.attention if attention is None else attention, threads=found)


def read_attention(text: str) -> AttentionChoice:
    """`BadConfig` for what is none."""
    if text not in get_args(AttentionChoice):
        raise BadConfig(f"attention_backend is {text[:100]!r}; it must be {', '.join(get_args(AttentionChoice))}")
    return cast(AttentionChoice, text)


def read_placement(text: str) -> Placement:
    """`BadConfig` for what is none."""
    if text not in get_args(Placement):
        raise BadConfig(f"placement is {text[:100]!r}; it must be {' or '.join(get_args(Placement))}")
    return cast(Placement, text)


def computed_with(
    stages: Sequence[StageName], versions: Mapping[str, str], threads: Mapping[StageName, int]
) -> dict[StageName, dict[str, str]]:
    """What each stage of a process computes with, as the process tells it."""
    return {
        stage: {name: versions[name] for name in LIBRARIES[stage] if name in versions}
        | ({"threads": str(threads[stage])} if LIBRARIES[stage] else {})
        for stage in stages
    }
