"""The supervisor to the process that rehearses its replacement (`engine/rehearsal.py`), and back."""

from __future__ import annotations

import msgspec


class RehearseProgram(msgspec.Struct, frozen=True, tag_field="type", tag="rehearse_program", kw_only=True):
    """Descriptors come with it: of all packets together, that of the document, and those that it speaks of in their
    order."""

    more: bool
    """Another packet follows."""


class ProgramRehearsed(msgspec.Struct, frozen=True, tag_field="type", tag="program_rehearsed", kw_only=True):
    """`problem` is empty if the program of version `engine` could go on with what it was given."""

    problem: str
    engine: str
