"""The loader and a LoRA: which files fit a model with two experts, and that it hands over all or nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hotreload.adapters import attach_adapter
from ipc.channel import Channel, close_fds
from ipc.errors import BadCheckpoint, BadConfig
from ipc.messages.loader import AnyLoaderReport, PlacedLora, ReadLora
from stages.loader import Asked, read_lora
from tests.stages.rig import TWO_EXPERTS

WIDTH = 24
"""Of the model of the rig."""


def write(path: Path, *prefixes: str, module: str = "blocks.0.attn1.to_q") -> str:
    """A pair for each prefix, of rank 1, 2, ..."""
    tensors = {}
    for rank, prefix in enumerate(prefixes, 1):
        tensors[f"{prefix}{module}.lora_A.weight"] = torch.full((rank, WIDTH), float(rank))
        tensors[f"{prefix}{module}.lora_B.weight"] = torch.ones(WIDTH, rank)
    save_file(tensors, path)
    return str(path)


def read(*files: str) -> list[PlacedLora]:
    """What a supervisor is handed; their memory holds what it should."""
    ours, theirs = Channel.pair()
    asked = ReadLora(
        supervisor_pid=os.getpid(), files=list(files), components=["transformer", "transformer_2"],
        transformer=TWO_EXPERTS.transformer,
    )  # fmt: skip
    supervisor: Channel[AnyLoaderReport] = Channel(ours, AnyLoaderReport)
    loader: Channel[Asked] = Channel(theirs, Asked)
    placed: list[PlacedLora] = []
    try:
        read_lora(asked, loader)
    finally:
        while (received := supervisor.try_receive()) is not None:
            assert isinstance(received.message, PlacedLora)
            placed.append(received.message)
            ((part,),) = attach_adapter(received.message.adapter.version, received.fds[0]).values()
            assert part.down is not None and part.down.shape == (part.down[0, 0], WIDTH)
            close_fds(received.fds)
        supervisor.close()
        loader.close()
    return placed


def test_a_file_for_each_expert_or_one_for_both(tmp_path: Path) -> None:
    high, low = (write(tmp_path / f"{name}.safetensors", "diffusion_model.") for name in "hl")
    both = write(tmp_path / "both.safetensors", "transformer.", "transformer_2.")
    for files, ranks in (((high, low), [1, 1]), ((both,), [1, 2])):
        placed = [p.adapter for p in read(*files)]
        assert [p.version.component for p in placed] == ["transformer", "transformer_2"]
        assert [p.rank for p in placed] == ranks


def test_what_does_not_fit_two_experts(tmp_path: Path) -> None:
    """One file for one expert, both-expert files in twos, files in the wrong order, a second file that does not fit the
    model, is cut short or missing: refused with the reason, and nothing is handed over."""
    one = write(tmp_path / "one.safetensors", "diffusion_model.")
    both = write(tmp_path / "both.safetensors", "transformer.", "transformer_2.")
    low, high = (write(tmp_path / f"{noise}_noise.safetensors", "unet.") for noise in ("low", "high"))
    stranger = write(tmp_path / "s.safetensors", "unet.", module="blocks.9.attn1.to_q")
    with pytest.raises(BadConfig, match=r"LoRA one\.safetensors is for one transformer, but the model has two experts"):
        read(one)
    with pytest.raises(BadConfig, match="holds both experts"):
        read(both, both)
    with pytest.raises(BadConfig, match="the order is HIGH,LOW"):
        read(low, high)
    with pytest.raises(BadCheckpoint, match=r"blocks\.9\.attn1\.to_q\.lora_A\.weight"):
        read(one, stranger)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(one).read_bytes()[:-10])
    with pytest.raises(BadCheckpoint, match=r"LoRA cut\.safetensors .* cut short"):
        read(one, str(cut))
    with pytest.raises(BadCheckpoint, match=r"none\.safetensors cannot be read"):
        read(str(tmp_path / "none.safetensors"))


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written to between its header and its end: refused."""
    from hotreload import adapters

    both = write(tmp_path / "both.safetensors", "transformer.", "transformer_2.")
    original = adapters.read_lora

    def write_meanwhile(*args: object) -> object:
        os.utime(both, ns=(1, 1))
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(adapters, "read_lora", write_meanwhile)
    with pytest.raises(BadCheckpoint, match=r"both\.safetensors changed while it was read"):
        read(both)
