"""The closed set of errors that cross process borders. The name says who must act.

On the wire an error is `Failure(code, message)`; `to_failure` and `from_failure` convert. A message is one or two
sentences: what went wrong, what was expected, what to do. It never carries a memory handle.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

MAX_MESSAGE = 2000
"""Characters of a message that travel: the control channel carries 128 KiB, and nobody reads more."""


class Failure(msgspec.Struct, frozen=True):
    """An error as it travels: `code` is the `code` of one of the classes below."""

    code: str
    message: str


class EngineError(Exception):
    """Base of every error the engine reports. `exit_code` is what the command line exits with."""

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1


class BadRequest(EngineError):
    """The user must change the request; nothing was started."""

    code = "bad_request"
    exit_code = 2


class BadCheckpoint(EngineError):
    """The operator must change the checkpoint or the model: a file or tensor is missing, extra or misshaped."""

    code = "bad_checkpoint"
    exit_code = 2


class BadConfig(EngineError):
    """The operator must change a system parameter or a model file."""

    code = "bad_config"
    exit_code = 2


class Busy(EngineError):
    """The queue is full; try again in about `retry_after` seconds, if that is known."""

    code = "busy"
    exit_code = 75

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotFound(EngineError):
    """No task has this id."""

    code = "not_found"
    exit_code = 2


class Cancelled(EngineError):
    """The task was cancelled before it was done."""

    code = "cancelled"
    exit_code = 130


class DeadlineExceeded(EngineError):
    """The request's own deadline passed before it was done."""

    code = "deadline_exceeded"


class OutputError(EngineError):
    """The video could not be written: the file system refused."""

    code = "output_error"


class PoisonedRequest(EngineError):
    """The request was running in two crashes of a stage and was set aside."""

    code = "poisoned_request"


class StageFailed(EngineError):
    """A stage process cannot be started or kept alive; the operator must look at it."""

    code = "stage_failed"


class ReloadFailed(EngineError):
    """What was to take the place of something cannot; what is there goes on. The operator must look at the new one."""

    code = "reload_failed"


class NumericalError(EngineError):
    """The model produced values that are not finite; the message names the step."""

    code = "numerical_error"


class OutOfMemory(EngineError):
    """The device, or the host, has not enough memory for the request at present; the message says what is known."""

    code = "out_of_memory"


class OutOfProcesses(EngineError):
    """The system starts no more processes or threads at present; the operator must raise a limit, or wait."""

    code = "out_of_processes"


class Superseded(EngineError):
    """Another reload came before this one had changed anything, and was carried out in its place."""

    code = "superseded"


class CanaryFailed(EngineError):
    """The new weights made a video that the operator does not want; the old ones go on."""

    code = "canary_failed"


class ProtocolError(EngineError):
    """The peer sent bytes that are not a frame of this protocol; the connection is closed."""

    code = "protocol_error"


class VersionMismatch(EngineError):
    """The peer speaks another version of the protocol; one side must be upgraded."""

    code = "version_mismatch"
    exit_code = 2


class PermissionDenied(EngineError):
    """This user may not do that on this server."""

    code = "permission_denied"


class ServerUnavailable(EngineError):
    """No server listens on the socket, or it went away."""

    code = "server_unavailable"


_BY_CODE: dict[str, type[EngineError]] = {
    cls.code: cls
    for cls in (
        EngineError, BadRequest, BadCheckpoint, BadConfig, Busy, NotFound, Cancelled, DeadlineExceeded, OutputError,
        PoisonedRequest, StageFailed, ReloadFailed, NumericalError, OutOfMemory, OutOfProcesses, Superseded,
        CanaryFailed, ProtocolError, VersionMismatch, PermissionDenied, ServerUnavailable,
    )
}  # fmt: skip


def to_failure(error: EngineError) -> Failure:
    """The wire form of an error, which can always be sent: a long message is cut, what is not UTF-8 is escaped."""
    message = str(error)
    if (left_out := len(message) - MAX_MESSAGE) > 0:
        message = f"{message[:MAX_MESSAGE]}... ({left_out:,} more characters)"
    return Failure(error.code, message.encode("utf-8", "backslashreplace").decode())


def from_failure(failure: Failure) -> EngineError:
    """The error that a wire form stands for; a code of a newer engine becomes the base class."""
    return _BY_CODE.get(failure.code, EngineError)(failure.message)
