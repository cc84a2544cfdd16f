"""Client to server: what may be asked. docs/protocol.md is the contract."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ipc.messages.names import MemoryLevel, StageName

PROTOCOL_VERSION = 1


class ClientMessage(msgspec.Struct, frozen=True, tag_field="type", kw_only=True):
    """`ref` is chosen by the client; the direct reply carries it back."""

    ref: int


class Hello(ClientMessage, frozen=True, tag="hello", kw_only=True):
    """Must be the first message. Another protocol version gets `Refused(version_mismatch)` and is closed."""

    version: int
    client: str = ""


class Submit(ClientMessage, frozen=True, tag="submit", kw_only=True):
    """Ask for a video. `params` is a `UserParams`, decoded strictly by the server: an unknown key is the user's error,
    not a protocol error. With `subscribe`, the task's events follow the reply on this connection."""

    params: msgspec.Raw
    subscribe: bool = True


class Cancel(ClientMessage, frozen=True, tag="cancel", kw_only=True):
    id: str


class Subscribe(ClientMessage, frozen=True, tag="subscribe", kw_only=True):
    """Receive the events of one task, from its present state to its end."""

    id: str


class ListTasks(ClientMessage, frozen=True, tag="list", kw_only=True):
    pass


class GetStatus(ClientMessage, frozen=True, tag="status", kw_only=True):
    """With `memory`, the reply lists who has what of the memory that outlives the stages."""

    memory: bool = False


class Shutdown(ClientMessage, frozen=True, tag="shutdown", kw_only=True):
    """Owner only. With `drain`, accepted tasks are finished first; without, they stay in the journal."""

    drain: bool = True


When = Literal["drain", "now", "pin"]
"""What becomes of requests that are running when weights change. drain, pin: they finish on the old version; with pin
it stays in memory afterwards. now: they change between two steps, and their metadata says so."""


class Canary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request that must go well on new weights before anybody else gets them."""

    params: msgspec.Raw
    """A `UserParams`."""
    reference: str | None = None
    """A video that it must resemble."""
    psnr: float = 30.0
    """How closely, in dB, at least."""


class Reload(ClientMessage, frozen=True, tag="reload", kw_only=True):
    """Owner only. Read weights from a directory and serve them; answered when that is so, or it failed and nothing has
    changed."""

    checkpoint: str
    components: list[str] = []
    """Names; empty: all that the model has."""
    when: When = "drain"
    canary: Canary | None = None
    manifest: str | None = None
    """Of SHA-256 sums, as `sha256sum` writes it; every file must be in it."""
    dry_run: bool = False
    """Read and verify, then forget it."""


class ReplaceStages(ClientMessage, frozen=True, tag="replace_stages", kw_only=True):
    """Owner only. Put new processes, with the code that is now on disk, in the places of these stages' (none: of all);
    answered when they serve, or one is not fit and its predecessor goes on. With another attention backend or number of
    threads (0: the default), if they are given, of the dit and the vae; or with another placement (split, fused) of
    all, which then leave before the new ones begin."""

    stages: list[StageName] = []
    attention_backend: str | None = None
    threads: int | None = None
    placement: str | None = None


class UpdateWeights(ClientMessage, frozen=True, tag="update_weights", kw_only=True):
    """Owner only. Serve the weights of a component that are in the memfd whose descriptor comes with the frame: a
    safetensors file with Diffusers' names, sealed against writing and shrinking."""

    component: str
    when: When = "drain"


class Rollback(ClientMessage, frozen=True, tag="rollback", kw_only=True):
    """Owner only. Serve what was served before the last reload."""

    when: When = "drain"


class ListVersions(ClientMessage, frozen=True, tag="versions", kw_only=True):
    pass


class ReloadSupervisor(ClientMessage, frozen=True, tag="reload_supervisor", kw_only=True):
    """Owner only. Replace the supervisor's program by the one that is on disk now, in the same process."""


class GetTrace(ClientMessage, frozen=True, tag="trace", kw_only=True):
    """When the latest quanta ran, and where."""


class ChangeMemory(ClientMessage, frozen=True, tag="change_memory", kw_only=True):
    """Owner only. Keep so much of the weights on the GPUs from now on, or, with auto, as much as fits; answered when
    that is so, or it failed and what was before holds."""

    level: MemoryLevel
    blocks: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """At level 3: of the DiT's blocks, so many stay on the device."""


class GetMemory(ClientMessage, frozen=True, tag="memory", kw_only=True):
    """How much of the weights is on the GPUs, and why."""


class AddLora(ClientMessage, frozen=True, tag="lora_add", kw_only=True):
    """Owner only. Read a LoRA file, or the high-noise and the low-noise expert's, and offer it to requests as `name`;
    answered with it when that is so. A `name` that is taken is given to this one from now on."""

    name: str
    files: list[str]


class RemoveLora(ClientMessage, frozen=True, tag="lora_remove", kw_only=True):
    """Owner only. Requests that were accepted with it are finished with it."""

    name: str


class ListLoras(ClientMessage, frozen=True, tag="lora_list", kw_only=True):
    pass


AnyClientMessage = (
    Hello
    | Submit
    | Cancel
    | Subscribe
    | ListTasks
    | GetStatus
    | Shutdown
    | Reload
    | UpdateWeights
    | ReplaceStages
    | Rollback
    | ListVersions
    | ReloadSupervisor
    | GetTrace
    | ChangeMemory
    | GetMemory
    | AddLora
    | RemoveLora
    | ListLoras
)
