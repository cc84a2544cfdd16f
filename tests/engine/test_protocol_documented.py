"""docs/protocol.md and ipc/messages/ say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from engine.session import Limits
from ipc.frames import MAX_FRAME
from ipc.messages.client import PROTOCOL_VERSION, AnyClientMessage
from ipc.messages.server import AnyServerMessage

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()


@pytest.mark.parametrize("message", [*get_args(AnyClientMessage), *get_args(AnyServerMessage)])
def test_every_message_and_field_is_on_the_page(message: type[msgspec.Struct]) -> None:
    """The page names each message's tag and each of its fields in code type."""
    assert f"`{message.__struct_config__.tag}`" in PAGE
    for field in msgspec.structs.fields(message):
        assert f"`{field.name}`" in PAGE, f"{field.name} of {message.__name__}"


def test_the_numbers_on_the_page_are_those_of_the_code() -> None:
    """Version, cap and limits."""
    limits = Limits()
    assert f"version {PROTOCOL_VERSION}" in PAGE.splitlines()[0]
    assert f"{MAX_FRAME:,}" in PAGE
    for said in (
        f"within {limits.handshake:g} s",
        f"{limits.clients} connections",
        f"{limits.followed} followed tasks",
    ):
        assert said in PAGE
    assert re.search(rf"complete {limits.frame:g} s after.*within {limits.drain:g} s", PAGE, re.DOTALL)
