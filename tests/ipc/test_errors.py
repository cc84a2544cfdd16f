"""Errors as they travel."""

from __future__ import annotations

from ipc.channel import Channel
from ipc.errors import MAX_MESSAGE, BadCheckpoint, Failure, from_failure, to_failure
from ipc.messages.reports import StartFailed


def test_an_error_of_any_length_can_be_sent() -> None:
    """140,000 characters over the control channel: the head arrives, as the same class, with how much was left out."""
    ours, theirs = Channel.pair()
    with Channel[StartFailed](ours, StartFailed) as sender, Channel[StartFailed](theirs, StartFailed) as receiver:
        sender.send(StartFailed(error=to_failure(BadCheckpoint("missing: " + "x" * 140_000))), timeout=1)
        error = from_failure(receiver.receive(1).message.error)
    assert isinstance(error, BadCheckpoint)
    assert str(error).startswith("missing: xxx") and str(error).endswith("... (138,009 more characters)")


def test_a_message_that_fits_is_not_touched() -> None:
    """Exactly as long as may be."""
    assert to_failure(BadCheckpoint("é" * MAX_MESSAGE)) == Failure("bad_checkpoint", "é" * MAX_MESSAGE)


def test_a_name_that_is_not_utf8_is_escaped() -> None:
    """A file's name, as Python has it, in a message."""
    assert to_failure(BadCheckpoint("\udcff.safetensors is cut short")).message == r"\udcff.safetensors is cut short"
