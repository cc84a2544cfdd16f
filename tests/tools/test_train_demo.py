"""Training, from drawn clips to a checkpoint directory that samples, with networks that are too small to learn."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tools import train_demo
from tools.demo_export import architecture_of, load
from tools.demo_networks import TINY, build
from tools.demo_sampling import Sampling, contact_sheet, generate
from tools.demo_training import load_module, save_module


def run_stage(monkeypatch: pytest.MonkeyPatch, folder: Path, stage: str, *more: str) -> None:
    """One call of the command."""
    arguments = ["--work", str(folder / "work"), "--out", str(folder / "out"), "--recipe", "dry", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["train_demo", "--stage", stage, *arguments, *more])
    train_demo.main()


def test_every_stage_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages run in order, a second VAE stage goes on from the first, and both revisions of the result sample."""
    run_stage(monkeypatch, tmp_path, "vae")
    run_stage(monkeypatch, tmp_path, "vae", "--resume", "--phases", "0", "--minutes", "0.2")
    for stage in ("dit", "style", "export"):
        run_stage(monkeypatch, tmp_path, stage)
    out = tmp_path / "out"
    tokenizer = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
    sampling = Sampling(steps=2, seed=1)
    clips = []
    for revision in (None, out / "revision-2"):
        networks = load(out, architecture_of(out), revision)
        clips.append(generate(networks, tokenizer, ["a red circle", "two shapes \U0001f3ac"], sampling))
    assert clips[0].shape == (2, 3, 17, 96, 96) and clips[0].dtype == torch.uint8
    assert not torch.equal(clips[0], clips[1])
    contact_sheet(clips[0], ["one", "two"], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 500


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    """Loading a file with other tensors names some of them and changes nothing."""
    networks = build(TINY)
    save_module(networks.vae, tmp_path / "vae.safetensors")
    before = networks.transformer.proj_out.bias.clone()
    with pytest.raises(ValueError, match="does not fit"):
        load_module(networks.transformer, tmp_path / "vae.safetensors")
    assert torch.equal(networks.transformer.proj_out.bias, before)
