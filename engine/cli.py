"""The command line. Every command is a thin wrapper; what it does is in the module of its name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.version import VERSION
from ipc.errors import BadCheckpoint, BadConfig, BadRequest, Cancelled, EngineError, NotFound

app = typer.Typer(
    name="engine", help="Text to video with Wan models: a server, its clients, and one-off runs.", no_args_is_help=True,
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

Socket = Annotated[str | None, typer.Option(help="Unix socket of the engine [$XDG_RUNTIME_DIR/engine/engine.sock]")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def main() -> None:
    """Run the command line; an `EngineError` is one message and its exit code, never a traceback. Nor is Ctrl-C, where
    a command has no other use for it."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(Cancelled.exit_code)
    except EngineError as error:
        print(f"engine: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the video shows.")],
    out: Annotated[Path, typer.Option(help="The video: a path that ends in .mp4.")] = Path("video.mp4"),
    negative_prompt: Annotated[str | None, typer.Option(help="What it must not show.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="4n + 1.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the file.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Up to 1: no guidance. With two experts, the HIGH-noise one's, and the other's, too, unless that is "
            "given; so it is also with a preset."
        ),
    ] = None,
    guidance_scale_2: Annotated[
        float | None,
        typer.Option(help="The LOW-noise expert's, of two [--guidance-scale if given, else the model's or preset's]."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same video [random].")] = None,
    noise_device: Annotated[
        str | None, typer.Option(help="cpu: the same noise everywhere; cuda: the original programs' [cpu].")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="distilled: 4 Euler steps without guidance, for step-distilled weights.")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="unipc, dpm++ or euler.")] = None,
    flow_shift: Annotated[float | None, typer.Option(help="Shift of the noise schedule.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to set in motion, or to start from.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video to start from.")] = None,
    strength: Annotated[float | None, typer.Option(help="How far to leave the start: over 0, up to 1 [0.8].")] = None,
    priority: Annotated[int, typer.Option(help="-10 to 10, higher first.")] = 0,
    deadline: Annotated[float | None, typer.Option(help="Give up after this many seconds.")] = None,
    metadata_json: Annotated[bool, typer.Option("--metadata-json", help="Also write the metadata beside it.")] = False,
    model: Annotated[str | None, typer.Option(help="See `engine models`.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Directory of the weights, without a server.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:STRENGTH",
            help="An adapter of `engine lora list`; again for each. Without a server FILE:STRENGTH, as for `serve`.",
        ),
    ] = None,
    placement: Annotated[str | None, typer.Option(help="split or fused, without a server.")] = None,
    trace_to: Annotated[
        Path | None, typer.Option("--trace", help="Also write when each stage worked on it, as `engine trace` does.")
    ] = None,
    socket: Socket = None,
    as_json: Json = False,
) -> None:
    """Make a video: on the running engine, or on one just for this."""
    fields = _given(
        locals(), leave_out=("out", "model", "checkpoint", "lora", "placement", "trace_to", "socket", "as_json")
    )
    from engine.decode import decode_strictly
    from engine.display.progress import progress_view, summary
    from engine.generate import Order, run, suggestions
    from engine.params import UserParams
    from engine.trace_file import check_target, write_trace

    params = decode_strictly(UserParams, {**fields, "output": str(out)}, BadRequest, "the request")
    if trace_to is not None:
        check_target(trace_to)
    order = Order(
        params=params, socket=socket, model=model, checkpoint=checkpoint, lora=tuple(lora or ()), placement=placement
    )  # fmt: skip
    outcome = run(order, progress_view(quiet=as_json), with_trace=trace_to is not None)
    if as_json:
        _print_json({"id": outcome.done.id, "path": outcome.done.path, "metadata": outcome.done.metadata})
    else:
        lines = summary(outcome.done, outcome.seconds, outcome.loading, outcome.waiting)
        print("\n".join([*lines, "next:", *(f"  {line}" for line in suggestions(order, outcome))]))
    if trace_to is not None and outcome.traced is not None:
        written = write_trace(trace_to, outcome.traced, outcome.done.id)
        if not as_json:
            print(written)


@app.command()
def serve(
    model: Annotated[str | None, typer.Option(help="See `engine models` [wan-demo].")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Directory of the weights: original, Diffusers or ComfyUI [those that ship].")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE:STRENGTH", help="Merged into the weights; two experts: HIGH,LOW:STRENGTH."),
    ] = None,
    placement: Annotated[str | None, typer.Option(help="split or fused: a process per stage, or one [split].")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N [auto].")] = None,
    dit_devices: Annotated[
        list[str] | None,
        typer.Option("--dit-device", metavar="DEVICE", help="Of a dit; again for each further one [one, on --device]."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16 [auto].")] = None,
    attention_backend: Annotated[
        str | None, typer.Option(help="What computes attention: auto, or one that `engine doctor` shows [auto].")
    ] = None,
    memory_level: Annotated[
        str | None,
        typer.Option(help="auto, or 0 to 3: how much of the weights leaves the GPU when it is not in use [auto]."),
    ] = None,
    gpu_budget: Annotated[
        str | None, typer.Option(help="What the engine may take of each GPU, such as 8GiB [all that is free].")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of each dit and of vae; 0: half the cores for all dits and vae [0].")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="shortest or fifo [shortest].")] = None,
    max_queue: Annotated[int | None, typer.Option(help="Accepted and unfinished requests at most [64].")] = None,
    state_dir: Annotated[str | None, typer.Option(help="Directory of the journal [~/.local/state/engine].")] = None,
    checkpoint_root: Annotated[
        str | None, typer.Option(help="Weights and LoRAs are only read below this directory [/].")
    ] = None,
    output_root: Annotated[str | None, typer.Option(help="Videos are only written below this directory [/].")] = None,
    allow_uids: Annotated[list[int] | None, typer.Option("--allow-uid", help="Serve this user, too.")] = None,
    warm_spare: Annotated[
        bool | None, typer.Option("--warm-spare", help="Keep a process ready for when a stage dies.")
    ] = None,
    socket: Socket = None,
    config: Annotated[Path | None, typer.Option(help="YAML of the same names; options win.")] = None,
) -> None:
    """Serve one model on a Unix socket until `engine shutdown`, SIGTERM or Ctrl-C."""
    flags = _given(locals(), leave_out=("config",))
    from engine.operator import read_level
    from engine.serve import run, system_params

    if memory_level is not None:
        flags["memory_level"] = read_level(memory_level)

    run(system_params(config, flags))


@app.command()
def status(
    socket: Socket = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Who has what of the memory that outlives the stages.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What the engine is doing: its stages and queues."""
    from engine.client import Client
    from engine.display.status import print_memory, print_status

    if memory:
        held = Client(socket).memory()
        _print_json(held) if as_json else print_memory(held)
        return
    found = Client(socket).status()
    _print_json(found) if as_json else print_status(found)


@app.command()
def reload(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Directory of new weights, in any layout that serve takes.")
    ] = None,
    component: Annotated[
        list[str] | None,
        typer.Option(
            help="transformer, transformer_2, vae, text_encoder or image_encoder, again for each; or all [all]."
        ),
    ] = None,
    when: Annotated[
        str | None,
        typer.Option(
            help="drain: running requests finish on the old weights; pin: and those stay in memory; now: running "
            "requests change between two steps [drain]."
        ),
    ] = None,
    canary: Annotated[
        Path | None,
        typer.Option(help="JSON of a request to try first: {params: {...}, reference: VIDEO, psnr: 30}."),
    ] = None,
    manifest: Annotated[Path | None, typer.Option(help="SHA-256 of every file, as sha256sum writes it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and verify the weights only.")] = False,
    stage: Annotated[
        list[str] | None,
        typer.Option(help="text, dit, vae or writer: a new process with the code now on disk; again for each."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="New processes for all stages.")] = False,
    attention_backend: Annotated[
        str | None, typer.Option(help="With --stage dit or --all: what computes attention from now on.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="With --stage dit, vae or --all: their CPU threads from now on; 0: the default.")
    ] = None,
    placement: Annotated[
        str | None, typer.Option(help="split or fused: new processes for all stages, one for each or one for all.")
    ] = None,
    supervisor: Annotated[
        bool, typer.Option("--supervisor", help="The engine's own program, by the one that is on disk now.")
    ] = False,
    socket: Socket = None,
    as_json: Json = False,
) -> None:
    """Serve other weights, or run the code now on disk, without a restart and without failing a request."""
    from engine.client import Client
    from engine.display.changes import print_reloaded, print_replaced, print_taken_over
    from engine.operator import check_of_weights, read_canary, read_components, read_stages, read_when

    of_weights = {"component": component, "when": when, "canary": canary, "manifest": manifest, "dry_run": dry_run}
    if checkpoint is None:
        check_of_weights(of_weights)
    client = Client(socket)
    processes = bool(stage or every or placement)
    if not processes and (attention_backend, threads) != (None, None):
        raise BadConfig("--attention-backend and --threads are of processes: say which, with --stage NAME or --all")
    if (checkpoint is not None) + processes + supervisor != 1:
        raise BadConfig(
            "say what to reload: --checkpoint DIR for weights, --stage NAME, --all or --placement for processes, or "
            "--supervisor"
        )
    if supervisor:
        taken_over = client.reload_supervisor()
        _print_json(taken_over) if as_json else print_taken_over(taken_over)
        return
    if checkpoint is None:
        replaced = client.replace_stages(
            read_stages(() if every else stage or ()), attention_backend=attention_backend, threads=threads,
            placement=placement,
        )  # fmt: skip
        _print_json(replaced) if as_json else print_replaced(replaced)
        return
    tried = None if canary is None else read_canary(canary)
    components = read_components(component or ())
    done = client.reload(checkpoint, components, read_when(when or "drain"), tried, manifest, dry_run)
    _print_json(done) if as_json else print_reloaded(done)


@app.command()
def rollback(
    when: Annotated[str, typer.Option(help="As for `engine reload`.")] = "drain",
    socket: Socket = None,
    as_json: Json = False,
) -> None:
    """Serve again the weights from before the last reload."""
    from engine.client import Client
    from engine.display.changes import print_reloaded
    from engine.operator import read_when

    done = Client(socket).rollback(read_when(when))
    _print_json(done) if as_json else print_reloaded(done)


@app.command()
def versions(socket: Socket = None, as_json: Json = False) -> None:
    """The versions of weights: what is served, what was before, what requests still use."""
    from engine.client import Client
    from engine.display.changes import print_versions

    found = Client(socket).versions()
    _print_json(found) if as_json else print_versions(found)


lora_app = typer.Typer(help="LoRA adapters that requests can name.", no_args_is_help=True)
app.add_typer(lora_app, name="lora")


@lora_app.command(name="add")
def lora_add(
    name: Annotated[str, typer.Argument(help="What requests call it; one that has the name already loses it.")],
    files: Annotated[
        str,
        typer.Argument(metavar="FILE[,LOW_NOISE_FILE]", help="safetensors; two experts: HIGH,LOW, or one with both."),
    ],
    socket: Socket = None,
    as_json: Json = False,
) -> None:
    """Load an adapter for requests to come: `engine generate --lora NAME:0.8`."""
    from engine.client import Client
    from engine.display.changes import print_loras
    from engine.operator import read_lora_files

    added = Client(socket).add_lora(name, *read_lora_files(files))
    _print_json(added) if as_json else print_loras([added])


@lora_app.command(name="list")
def lora_list(socket: Socket = None, as_json: Json = False) -> None:
    """The adapters that requests can name, and those that unfinished ones still use."""
    from engine.client import Client
    from engine.display.changes import print_loras

    found = Client(socket).loras()
    _print_json(found) if as_json else print_loras(found)


@lora_app.command(name="remove")
def lora_remove(name: Annotated[str, typer.Argument(help="See `engine lora list`.")], socket: Socket = None) -> None:
    """Take an adapter away; requests that were accepted with it are finished with it."""
    from engine.client import Client

    Client(socket).remove_lora(name)
    print(f"removed {name}")


@app.command(name="list")
def list_tasks(socket: Socket = None, as_json: Json = False) -> None:
    """Unfinished requests and the latest finished ones."""
    from engine.client import Client
    from engine.display.status import print_tasks

    found = Client(socket).tasks()
    _print_json(found) if as_json else print_tasks(found)


@app.command()
def cancel(
    identity: Annotated[str, typer.Argument(metavar="ID", help="Of the request; its first characters are enough.")],
    socket: Socket = None,
) -> None:
    """Stop a request at its next step; no file is left of it. Too late while the end of its video is written."""
    from engine.client import Client

    client = Client(socket)
    matching = [task for task in client.tasks() if identity and task.id.startswith(identity)]
    unfinished = [task for task in matching if task.state in ("queued", "running")]
    if not matching:
        raise NotFound(f"no request has an id that starts with {identity!r}: see `engine list`")
    if not unfinished:
        raise NotFound(f"request {matching[0].id[:8]} is not running any more: it is {matching[0].state}")
    if len(unfinished) > 1:
        raise BadRequest(f"{len(unfinished)} requests start with {identity!r}: give more of the id")
    client.cancel(chosen := unfinished[0].id)
    if any(task.id == chosen and task.state != "cancelled" for task in client.tasks()):
        raise NotFound(f"too late to cancel {chosen[:8]}: the end of its video is being written")
    print(f"cancelled {chosen}")


@app.command()
def models(
    size: Annotated[
        str | None, typer.Option(help="Of the video whose memory is told, such as 832x480x81 [each model's usual one].")
    ] = None,
    as_json: Json = False,
) -> None:
    """The models this engine knows, whether their weights are here, and what they take at each memory level."""
    from engine.catalogue import describe_models
    from engine.display.models import print_models

    found, problems = describe_models(size)
    _print_json(found) if as_json else print_models(found, size)
    if problems:
        raise BadConfig(f"left out: {'; '.join(problems)}")


@app.command()
def check(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Of a checkpoint.")],
    model: Annotated[str | None, typer.Option(help="See `engine models` [found by looking].")] = None,
    size: Annotated[
        str | None, typer.Option(help="Of the video whose memory is told, such as 832x480x81 [the model's usual one].")
    ] = None,
    as_json: Json = False,
) -> None:
    """What a checkpoint holds, what is missing or wrong in it, and how much memory it needs. Loads no weights."""
    from engine.check import check_checkpoint
    from engine.display.models import print_check

    report = check_checkpoint(directory, model, size)
    _print_json(report) if as_json else print_check(report)
    if not report.complete:
        raise typer.Exit(BadCheckpoint.exit_code)


@app.command()
def doctor(
    model: Annotated[
        str, typer.Option(help="Whose attention and blocks are tried: see `engine models`.")
    ] = "wan2.1-t2v-1.3b",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    attention_backend: Annotated[str, typer.Option(help="As for `engine serve`.")] = "auto",
    as_json: Json = False,
) -> None:
    """What this machine computes with: which attention backends are right, how fast they are, and which kernels; and
    what memory level 3 costs here: page-locking, copies, and from how many tokens on it costs no time. On a GPU,
    engines that are started later take the attention that is found best here."""
    from engine.decode import decode_strictly
    from engine.doctor import examine, print_doctor
    from engine.params import SystemParams

    fields = {"model": model, "device": device, "dtype": dtype, "attention_backend": attention_backend}
    report = examine(decode_strictly(SystemParams, fields, BadConfig, "the command"))
    _print_json(report) if as_json else print_doctor(report)
    if not report.attention:
        raise typer.Exit(BadConfig.exit_code)


@app.command()
def trace(
    identity: Annotated[
        str | None, typer.Argument(metavar="ID", help="Of a request; its first characters are enough [all].")
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="Only the request that began last.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file.")] = Path("trace.json"),
    socket: Socket = None,
) -> None:
    """When each stage and device worked on what, as a file for https://ui.perfetto.dev."""
    from engine.client import Client
    from engine.trace_file import write_trace

    if last and identity is not None:
        raise BadRequest("give either the ID of a request or --last")
    print(write_trace(out, Client(socket).trace(), identity, last))


@app.command()
def memory(
    level: Annotated[
        str | None, typer.Argument(metavar="LEVEL", help="0 to 3, or auto: as much as fits [only show].")
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(min=0, help="At level 3: of the DiT's blocks, so many stay on the GPU [0].")
    ] = None,
    socket: Socket = None,
    as_json: Json = False,
) -> None:
    """How much of the weights is in GPU memory, and why; or change it. Requests go on, with the same results."""
    from engine.client import Client
    from engine.display.status import print_memory_levels
    from engine.operator import read_level

    client = Client(socket)
    if blocks is not None and level != "3":
        raise BadRequest("--blocks is of level 3: engine memory 3 --blocks N")
    found = client.memory_levels() if level is None else client.change_memory(read_level(level), blocks)
    _print_json(found) if as_json else print_memory_levels(found)


@app.command()
def shutdown(
    now: Annotated[bool, typer.Option("--now", help="Leave unfinished requests in the journal.")] = False,
    socket: Socket = None,
) -> None:
    """Stop the engine, after the requests it has accepted."""
    from engine.client import Client

    client = Client(socket)
    found = client.status()
    unfinished = found.running + found.waiting
    if unfinished:
        what = "they stay in the journal" if now else "waiting for them"
        print(f"unfinished requests: {unfinished}; {what}", flush=True)
    client.shutdown(drain=not now)
    print(f"the engine at {client.socket} has stopped")


@app.command()
def version() -> None:
    """The version of this engine and of its protocol."""
    from ipc.messages.client import PROTOCOL_VERSION

    print(f"engine {VERSION}, protocol {PROTOCOL_VERSION}, Python {sys.version.split()[0]}")


def _given(values: dict[str, Any], leave_out: tuple[str, ...]) -> dict[str, Any]:
    """The options that were given, paths as strings."""
    kept = {name: value for name, value in values.items() if value not in (None, []) and name not in leave_out}
    return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}


def _print_json(value: object) -> None:
    import msgspec

    print(msgspec.json.encode(value).decode())
