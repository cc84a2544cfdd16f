"""Reads new versions of weights, or a LoRA, while the engine serves: `python -m stages.loader FD`, FD being its end of
a channel.

It gets one `Read` or `ReadLora`, verifies everything that can be wrong with a file, places each component in fresh
memory that outlives it, hands the descriptors over, and ends. So a bad file can only end this process, and nobody
computes with what it made before the supervisor says so.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ipc.channel import Channel, ChannelClosed, close_fds
from ipc.errors import BadCheckpoint, EngineError, Failure, to_failure
from ipc.messages import Component, Placed, PlacedLora, Read, ReadAll, ReadFailed, ReadLora
from stages.worker import (
    EXIT_ORPHANED,
    EXIT_START_FAILED,
    SEND_TIMEOUT,
    START_TIMEOUT,
    LoadingReporter,
    is_out_of_memory,
    load_torch,
    out_of_memory,
    summary,
    watch_supervisor,
)

FINITE_BYTES = 64 << 20
"""Looked at a time."""

Stamp = tuple[int, int, int, int]
"""What changes when a file is replaced or written to."""


Asked = Read | ReadLora


def read_all(asked: Read, channel: Channel[Asked], fds: list[int]) -> None:
    """Read, verify, place and hand over every component. Raises `BadCheckpoint` and `OutOfMemory`."""
    from ipc.tensors import dtype_of
    from stages.models.blueprint import build
    from stages.weights import place

    files = dict(zip(asked.in_memory, fds, strict=True))
    if asked.manifest is not None:
        check_manifest(Path(asked.manifest), asked.components)
    loading = LoadingReporter(channel, lambda: None)
    for component in asked.components:
        if component.name in files:
            component = msgspec.structs.replace(component, files=[f"/proc/self/fd/{files[component.name]}"])
        for device in asked.devices[component.name]:
            blueprint = build(component.name, asked)
            with unchanged(component):
                version, placement = place(
                    blueprint.module, component, device=device, dtype=blueprint.dtype(dtype_of(asked.dtype)),
                    aliases=blueprint.aliases, progress=progress_of(loading, component.name),
                )  # fmt: skip
                check_finite(component.name, placement.tensors)
            channel.send(Placed(version=version, device=device), [placement.fd], timeout=SEND_TIMEOUT)
            placement.close()


def read_lora(asked: ReadLora, channel: Channel[Asked]) -> None:
    """Read, verify, place and hand over what a LoRA adds to each component. Raises `BadConfig` for a number of files
    that does not fit the model, `BadCheckpoint` for a file, `OutOfMemory`."""
    from hotreload.adapters import place_adapter
    from hotreload.lora_options import for_each_expert
    from stages.models.blank import blank
    from stages.models.transformer import WanTransformer

    with blank():
        shapes = {name: tuple(tensor.shape) for name, tensor in WanTransformer(asked.transformer).state_dict().items()}
    files = for_each_expert(tuple(asked.files), asked.components, os.path.basename)
    placed = []
    with unchanged(Component(name="LoRA", files=asked.files)):
        for name, file in zip(asked.components, files, strict=True):
            placed.append(place_adapter(Path(file), name, shapes, f"LoRA {os.path.basename(file)}"))
    for adapter, placement in placed:
        channel.send(PlacedLora(adapter=adapter), [placement.fd], timeout=SEND_TIMEOUT)
        placement.close()


def progress_of(loading: LoadingReporter, component: str) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        loading(component, done, total)

    return progress


@contextmanager
def unchanged(component: Component) -> Iterator[None]:
    """`BadCheckpoint` if one of the component's files is another one, or was written to, at the end."""
    before = stamps(component)
    yield
    if changed := [Path(file).name for file, stamp in stamps(component).items() if stamp != before[file]]:
        raise BadCheckpoint(
            f"{component.name}: {', '.join(changed)} changed while it was read; reload when it is complete"
        )


def stamps(component: Component) -> dict[str, Stamp]:
    found = {}
    for file in [*component.files, *(lora.file for lora in component.loras)]:
        try:
            status = os.stat(file)
        except OSError as error:
            raise BadCheckpoint(f"{component.name}: {Path(file).name} cannot be read: {error.strerror}") from error
        found[file] = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def check_finite(component: str, tensors: Mapping[str, object]) -> None:
    """`BadCheckpoint` naming the first tensor with a value that is NaN or infinite."""
    import torch

    for name, tensor in tensors.items():
        assert isinstance(tensor, torch.Tensor)
        flat = tensor.reshape(-1)
        for stretch in flat.split(FINITE_BYTES // flat.element_size()):
            # float32: on a CPU 5 GB/s, where bfloat16 itself is at 0.2.
            if stretch.numel() and not torch.stack(stretch.float().aminmax()).isfinite().all():
                raise BadCheckpoint(f"{component}: {name} has values that are not finite (NaN or infinity)")


def check_manifest(manifest: Path, components: list[Component]) -> None:
    """`BadCheckpoint` for a file of these components that the manifest, lines of `SHA-256  PATH` with paths relative to
    it, does not name, or whose sum is another."""
    try:
        lines = manifest.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadCheckpoint(f"the manifest {manifest.name} cannot be read: {error}") from error
    sums = {}
    for line in filter(str.strip, lines):
        digest, _, name = line.partition(" ")
        sums[os.path.realpath(manifest.parent / name.strip().removeprefix("*"))] = digest.lower()
    for component in components:
        for file in component.files:
            expected = sums.get(os.path.realpath(file))
            if expected is None:
                raise BadCheckpoint(f"{component.name}: {Path(file).name} is not in the manifest {manifest.name}")
            with open(file, "rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            if found != expected:
                raise BadCheckpoint(
                    f"{component.name}: {Path(file).name} has the SHA-256 {found}; the manifest says {expected}"
                )


def failure_of(error: Exception) -> Failure:
    if isinstance(error, EngineError):
        return to_failure(error)
    if isinstance(error, OSError):
        return to_failure(BadCheckpoint(summary(error)))
    traceback.print_exception(error)
    if is_out_of_memory(error):
        return to_failure(out_of_memory(error, "dit"))
    return Failure(EngineError.code, f"the loader failed: {summary(error)}")


def run(channel: Channel[Asked]) -> int:
    """The life of the process; returns its exit code."""
    asked, fds = channel.receive(START_TIMEOUT)
    watch_supervisor(asked.supervisor_pid)
    load_torch()
    try:
        if isinstance(asked, ReadLora):
            read_lora(asked, channel)
        else:
            read_all(asked, channel, fds)
    except ChannelClosed:
        raise
    except Exception as error:
        channel.send(ReadFailed(error=failure_of(error)), timeout=SEND_TIMEOUT)
        return EXIT_START_FAILED
    finally:
        close_fds(fds)
    channel.send(ReadAll(), timeout=SEND_TIMEOUT)
    return 0


def main() -> None:
    """As `stages.worker.main`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel: Channel[Asked] = Channel(socket.socket(fileno=int(sys.argv[1])), Asked)
    try:
        code = run(channel)
    except ChannelClosed:
        code = EXIT_ORPHANED
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
