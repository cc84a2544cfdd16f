"""Reads new versions of weights, or a LoRA, while the engine serves: `python -m stages.loader FD`, FD being its end of
a channel.

Each `Read` or `ReadLora` is carried out by a process of its own, forked from this one, which has torch loaded and reads
no file. That one verifies everything that can be wrong with a file, places each component in fresh memory that outlives
it, hands the descriptors over, and ends. So a bad file can only end its own reader, and nobody computes with what that
made before the supervisor says so. Requests go first: all of this is at a low priority. What goes to a GPU is read by
this process itself, which ends then: that is what was tried on a GPU.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from hotreload.files import Stamp, path_of_descriptor, small_file, stamp
from ipc.channel import Channel, ChannelClosed, close_fds
from ipc.errors import BadCheckpoint, EngineError, Failure, OutOfMemory, ServerUnavailable, to_failure
from ipc.lacking import why_not_started
from ipc.messages.loader import PlacedLora, Read, ReadAll, ReadFailed, ReadLora
from ipc.messages.reports import Placed
from ipc.messages.weights import Component
from stages.failures import is_out_of_memory, out_of_memory, summary
from stages.loop import SEND_TIMEOUT
from stages.worker import (
    EXIT_ORPHANED,
    EXIT_START_FAILED,
    START_TIMEOUT,
    LoadingReporter,
    load_torch,
    watch_supervisor,
)

FINITE_BYTES = 64 << 20
"""Looked at a time."""
MAX_MANIFEST = 16 << 20
"""Bytes of a manifest; a line takes some hundred."""
NICE = 10
"""Steps of priority below the stages': a tenth of the time of a core that they want too."""

Asked = Read | ReadLora


def read_all(asked: Read, channel: Channel[Asked], fds: Sequence[int]) -> None:
    """Read, verify, place and hand over every component. Raises `BadCheckpoint` and `OutOfMemory`."""
    from ipc.tensors import dtype_of
    from stages.models.blueprint import build
    from stages.weights import place

    components = with_descriptors(asked, fds)
    loading = LoadingReporter(channel, lambda: None)
    with unchanged(components):
        if asked.manifest is not None:
            check_manifest(Path(asked.manifest), components)
        for component in components:
            for device in asked.devices[component.name]:
                blueprint = build(component.name, asked)
                version, placement = place(
                    blueprint.module, component, device=device, dtype=blueprint.dtype(dtype_of(asked.dtype)),
                    aliases=blueprint.aliases, progress=progress_of(loading, component.name),
                )  # fmt: skip
                with closing(placement):
                    check_finite(component.name, placement.tensors)
                    channel.send(Placed(version=version, device=device), [placement.fd], timeout=SEND_TIMEOUT)


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
    with unchanged([Component(name="LoRA", files=asked.files)]):
        for name, file in zip(asked.components, files, strict=True):
            placed.append(place_adapter(Path(file), name, shapes, f"LoRA {os.path.basename(file)}"))
    for adapter, placement in placed:
        channel.send(PlacedLora(adapter=adapter), [placement.fd], timeout=SEND_TIMEOUT)
        placement.close()


def with_descriptors(asked: Read, fds: Sequence[int]) -> list[Component]:
    """The components, those in memory as files of this process."""
    given = dict(zip(asked.in_memory, fds, strict=True))
    return [
        msgspec.structs.replace(c, files=[path_of_descriptor(given[c.name])]) if c.name in given else c
        for c in asked.components
    ]


def progress_of(loading: LoadingReporter, component: str) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        loading(component, done, total)

    return progress


@contextmanager
def unchanged(components: Sequence[Component]) -> Iterator[None]:
    """`BadCheckpoint` if a file of these components is another one, or was written to, at the end."""
    before = [stamps(component) for component in components]
    yield
    for component, was in zip(components, before, strict=True):
        if changed := [Path(file).name for file, stamp in stamps(component).items() if stamp != was[file]]:
            raise BadCheckpoint(
                f"{component.name}: {', '.join(changed)} changed while it was read; reload when it is complete"
            )


def stamps(component: Component) -> dict[str, Stamp]:
    found = {}
    for file in [*component.files, *(lora.file for lora in component.loras)]:
        try:
            found[file] = stamp(Path(file))
        except OSError as error:
            raise BadCheckpoint(f"{component.name}: {Path(file).name} cannot be read: {error.strerror}") from error
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
        lines = small_file(manifest, MAX_MANIFEST).decode().splitlines()
    except OSError as error:
        raise BadCheckpoint(f"the manifest {manifest.name} cannot be read: {error.strerror}") from error
    except ValueError as error:  # it is too large, or not UTF-8
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


def carry_out(asked: Asked, channel: Channel[Asked], fds: Sequence[int]) -> int:
    """The life of the process that reads; returns its exit code. The last thing it does is to say how it ended."""
    try:
        if isinstance(asked, ReadLora):
            read_lora(asked, channel)
        else:
            read_all(asked, channel, fds)
    except ChannelClosed:
        return EXIT_ORPHANED
    except Exception as error:
        channel.send(ReadFailed(error=failure_of(error)), timeout=SEND_TIMEOUT)
        return EXIT_START_FAILED
    channel.send(ReadAll(), timeout=SEND_TIMEOUT)
    return 0


def in_a_process(asked: Asked, channel: Channel[Asked], fds: Sequence[int]) -> None:
    """Have it carried out, and say what became of who could not say so itself."""
    parent = os.getpid()
    with warnings.catch_warnings():
        # The other threads wait, in numpy's BLAS, and for the end of the supervisor: they hold nothing.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            pid = os.fork()
        except OSError as error:
            refused = ServerUnavailable(f"no process could be started to read the weights: {why_not_started(error)}")
            channel.send(ReadFailed(error=to_failure(refused)), timeout=SEND_TIMEOUT)
            return
    if pid == 0:
        code = 1
        try:
            watch_supervisor(parent)
            code = carry_out(asked, channel, fds)
        finally:
            sys.stderr.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status not in (0, EXIT_START_FAILED):
        channel.send(ReadFailed(error=to_failure(death_of(status))), timeout=SEND_TIMEOUT)


def death_of(status: int) -> EngineError:
    """What the process that read died of: `status` is its exit code, or the number of a signal, negative."""
    if status == -signal.SIGKILL:
        return OutOfMemory(
            "the process that read the weights was killed, as the system does for lack of memory; nothing was changed"
        )
    how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
    return BadCheckpoint(f"the process that read the weights died of them ({how}); nothing was changed")


def load_networks(asked: Asked) -> None:
    """Import, once for all readers, what they need."""
    from stages.models.blueprint import build

    if isinstance(asked, Read):
        for component in asked.components:
            build(component.name, asked)


def is_for_gpu(asked: Asked) -> bool:
    return isinstance(asked, Read) and any(d != "cpu" for devices in asked.devices.values() for d in devices)


def serve(channel: Channel[Asked]) -> int:
    """One after another, until the supervisor ends the channel, or one was for a GPU; the exit code."""
    asked, fds = channel.receive(START_TIMEOUT)
    watch_supervisor(asked.supervisor_pid)
    load_torch()
    while True:
        load_networks(asked)
        if is_for_gpu(asked):
            return carry_out(asked, channel, fds)
        in_a_process(asked, channel, fds)
        close_fds(fds)
        asked, fds = channel.receive(None)


def main() -> None:
    """As `stages.worker.main`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICE)
    channel: Channel[Asked] = Channel(socket.socket(fileno=int(sys.argv[1])), Asked)
    try:
        code = serve(channel)
    except ChannelClosed:
        code = EXIT_ORPHANED
    except Exception as error:
        traceback.print_exception(error)
        code = EXIT_START_FAILED
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
