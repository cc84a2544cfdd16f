"""What has changed in a running engine: `engine reload`, `engine rollback`, `engine versions`, `engine lora`."""

from __future__ import annotations

from collections.abc import Sequence

from engine.amounts import size
from engine.display.tables import print_table
from ipc.messages.server import Reloaded, Replaced, SupervisorReloaded
from ipc.messages.status import (
    LoraInfo,
    VersionInfo,
)


def print_reloaded(done: Reloaded) -> None:
    """`engine reload` and `engine rollback`."""
    for name, content in done.weights.items():
        print(f"{name}: {'would become' if done.dry_run else 'is now'} {content[:12]}")
    for name, content in done.unchanged.items():
        print(f"{name}: {content[:12]}, as before")
    if done.bytes:
        print(f"{size(done.bytes)} read and verified in {done.seconds:.1f} s")
    if done.running:
        print(f"requests that finish on what was served before: {done.running}")


def print_replaced(done: Replaced) -> None:
    """`engine reload --stage`."""
    for seat, pid in done.pids.items():
        print(f"{seat}: process {pid}, ready {done.seconds[seat]:.2f} s after its predecessor had left")


def print_taken_over(done: SupervisorReloaded) -> None:
    """`engine reload --supervisor`."""
    print(f"engine {done.engine} has taken over; nothing was answered for {done.paused:.2f} s")


def print_versions(found: Sequence[VersionInfo]) -> None:
    """`engine versions`."""
    rows = [
        (v.component, v.content[:12], v.state, v.source, ", ".join(v.placed) or "-", size(v.bytes) if v.bytes else "-",
         v.served, v.running)
        for v in sorted(found, key=lambda v: (v.component, v.state != "serving"))
    ]  # fmt: skip
    print_table(("component", "version", "state", "from", "placed", "bytes", "videos", "running"), rows)


def print_loras(found: Sequence[LoraInfo]) -> None:
    """`engine lora list`."""
    rows = [
        (i.name, i.state, ", ".join(i.files), ", ".join(f"{name} {c[:12]}" for name, c in i.content.items()),
         i.rank or "-", i.tensors or "-", size(i.bytes) if i.bytes else "-", i.running)
        for i in found
    ]  # fmt: skip
    print_table(("LoRA", "state", "from", "adds", "rank", "tensors", "bytes", "running"), rows)
