"""A long-running, hot-upgradable text-to-video engine for the Wan model family.

from engine import Supervisor, SystemParams, UserParams   # inside an asyncio service
from engine import AsyncClient, Client                    # of a running `engine serve`

A name is imported when it is first asked for: a command that shows a list does not wait for the supervisor's modules.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from engine.version import VERSION as __version__

if TYPE_CHECKING:
    from engine.client import AsyncClient, Client
    from engine.params import ModelParams, SystemParams, UserParams
    from engine.supervisor import Supervisor
    from ipc.errors import (
        BadCheckpoint,
        BadConfig,
        BadRequest,
        Busy,
        Cancelled,
        DeadlineExceeded,
        EngineError,
        NotFound,
        NumericalError,
        OutOfMemory,
        OutOfProcesses,
        OutputError,
        PermissionDenied,
        PoisonedRequest,
        ProtocolError,
        ReloadFailed,
        ServerUnavailable,
        StageFailed,
        VersionMismatch,
    )
else:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'engine' has no attribute {name!r}")
        value = getattr(import_module(_HOMES.get(name, "ipc.errors")), name)
        globals()[name] = value
        return value


_HOMES = {
    "AsyncClient": "engine.client",
    "Client": "engine.client",
    "ModelParams": "engine.params",
    "Supervisor": "engine.supervisor",
    "SystemParams": "engine.params",
    "UserParams": "engine.params",
}
"""Where each name is that is no error."""

__all__ = [
    "AsyncClient",
    "BadCheckpoint",
    "BadConfig",
    "BadRequest",
    "Busy",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "EngineError",
    "ModelParams",
    "NotFound",
    "NumericalError",
    "OutOfMemory",
    "OutOfProcesses",
    "OutputError",
    "PermissionDenied",
    "PoisonedRequest",
    "ProtocolError",
    "ReloadFailed",
    "ServerUnavailable",
    "StageFailed",
    "Supervisor",
    "SystemParams",
    "UserParams",
    "VersionMismatch",
    "__version__",
]
