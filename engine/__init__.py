"""A long-running, hot-upgradable text-to-video engine for the Wan model family.

from engine import Supervisor, SystemParams, UserParams   # inside an asyncio service
from engine import AsyncClient, Client                    # of a running `engine serve`
"""

from engine.client import AsyncClient, Client
from engine.params import ModelParams, SystemParams, UserParams
from engine.supervisor import Supervisor
from engine.version import VERSION as __version__
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
    OutputError,
    PermissionDenied,
    PoisonedRequest,
    ProtocolError,
    ReloadFailed,
    ServerUnavailable,
    StageFailed,
    VersionMismatch,
)

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
