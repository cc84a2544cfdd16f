"""The dit with LoRA adapters: pairs for two experts, steps of tasks in turns, and what is held of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hotreload.adapters import place_adapter
from ipc.messages.job import Job, JobLora
from ipc.messages.weights import WeightVersion
from stages.dit import DitStage
from stages.models.transformer import WanTransformer
from tests.stages.rig import TWO_EXPERTS, Rig, is_empty, make_checkpoint, make_job
from tests.stages.test_dit import denoise, put_prompts, step, take_latents

EXPERTS = ("transformer", "transformer_2")
SHAPES = {name: tuple(tensor.shape) for name, tensor in WanTransformer(TWO_EXPERTS.transformer).state_dict().items()}
TARGETS = ("blocks.0.attn1.to_q", "blocks.1.ffn.net.0.proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"), TWO_EXPERTS)


@pytest.fixture
def rig(base: Path) -> Iterator[Rig]:
    with Rig(base, TWO_EXPERTS) as rig:
        yield rig


class Pair:
    """An adapter for both experts, in memory, with other values for each."""

    def __init__(self, directory: Path, name: str, seed: int, rank: int) -> None:
        self.name = name
        self.versions: dict[str, WeightVersion] = {}
        self.files: dict[str, Path] = {}
        self.fds: dict[str, int] = {}
        generator = torch.Generator().manual_seed(seed)
        for component in EXPERTS:
            tensors = {}
            for target in TARGETS:
                rows, columns = SHAPES[f"{target}.weight"]
                tensors[f"{target}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
                tensors[f"{target}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
            self.files[component] = directory / f"{name}-{component}.safetensors"
            save_file(tensors, self.files[component])
            adapter, placement = place_adapter(self.files[component], component, SHAPES, name)
            self.versions[component], self.fds[component] = adapter.version, os.dup(placement.fd)
            placement.close()

    def at(self, strength: float) -> JobLora:
        content = {component: version.content for component, version in self.versions.items()}
        return JobLora(name=self.name, strength=strength, content=content)

    def lend(self, stage: DitStage) -> None:
        """As the supervisor does with the `Begin` of a task that wants it."""
        for component, network in stage.networks.items():
            network.lend(self.versions[component], self.fds[component])


@pytest.fixture
def pairs(tmp_path: Path) -> Iterator[tuple[Pair, Pair]]:
    both = Pair(tmp_path, "a", 1, 2), Pair(tmp_path, "b", 2, 5)
    yield both
    for pair in both:
        for fd in pair.fds.values():
            os.close(fd)


def load(rig: Rig) -> DitStage:
    stage = rig.load("dit")
    assert isinstance(stage, DitStage)
    return stage


def with_pair(rig: Rig, stage: DitStage, pair: Pair, strength: float = 1.0) -> torch.Tensor:
    pair.lend(stage)
    return denoise(rig, make_job(loras=[pair.at(strength)], steps=4), stage)


def merged(tmp_path: Path, pair: Pair) -> torch.Tensor:
    """The latents of weights on disk that the adapter was added to."""
    from safetensors.torch import load_file

    made = make_checkpoint(tmp_path / f"merged-{pair.name}", TWO_EXPERTS)
    for component in EXPERTS:
        (file,) = (made / component).glob("*.safetensors")
        tensors, added = {k: v.float() for k, v in load_file(file).items()}, load_file(pair.files[component])
        for target in TARGETS:
            tensors[f"{target}.weight"] += added[f"{target}.lora_B.weight"] @ added[f"{target}.lora_A.weight"]
        save_file(tensors, file)
    with Rig(made, TWO_EXPERTS) as other:
        return denoise(other, make_job(steps=4))


def test_pairs_and_none(tmp_path: Path, rig: Rig, pairs: tuple[Pair, Pair]) -> None:
    """A, B of another rank, none, A: each expert has its own file's, as merged on disk; and nothing is left of it."""
    a, b = pairs
    golden = [merged(tmp_path, a), merged(tmp_path, b), denoise(rig, make_job(steps=4))]
    assert not any(torch.equal(golden[i], golden[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    stage = load(rig)
    assert torch.equal(with_pair(rig, stage, a), golden[0])
    assert torch.equal(with_pair(rig, stage, b), golden[1])
    assert torch.equal(denoise(rig, make_job(steps=4), stage), golden[2])
    assert torch.equal(with_pair(rig, stage, a), golden[0])
    assert torch.equal(with_pair(rig, stage, a, 0.0), golden[2])
    assert is_empty(rig)


def test_steps_in_turns(rig: Rig, pairs: tuple[Pair, Pair]) -> None:
    """Two tasks with other adapters, one step each in turns, and a new process in the middle: the bytes of each are
    those that it has alone."""
    stage = load(rig)
    alone = [with_pair(rig, stage, pair) for pair in pairs]
    jobs: list[Job] = [make_job(loras=[pair.at(1.0)], steps=4) for pair in pairs]

    def begin(stage: DitStage) -> None:
        for pair, job in zip(pairs, jobs, strict=True):
            pair.lend(stage)
            stage.begin(job)

    for job in jobs:
        put_prompts(rig, job)
    begin(stage)
    for index in range(4):
        for job in jobs:
            step(stage, job, index)
        if index == 1:
            rig.reclaim("dit")
            stage = load(rig)
            begin(stage)
    for job, expected in zip(jobs, alone, strict=True):
        assert torch.equal(take_latents(rig, job), expected)
        stage.drop(job.id)
    assert is_empty(rig)


def test_one_overlay_at_a_time_and_none_at_the_end(rig: Rig, pairs: tuple[Pair, Pair]) -> None:
    """While a task runs, one expert has tensors of its own; when the last task that wants an adapter is dropped, all
    are those of the version again, and the adapter is unmapped."""
    a, _ = pairs
    stage = load(rig)
    high, low = stage.networks.values()
    job = make_job(loras=[a.at(1.0)], steps=4)
    a.lend(stage)
    put_prompts(rig, job)
    stage.begin(job)
    bound = []
    for index in range(4):
        step(stage, job, index)
        bound.append((bool(high.bound.loras), bool(low.bound.loras)))  # type: ignore[attr-defined]
    assert set(bound) == {(True, False), (False, True)}
    stage.drop(job.id)
    for network in (high, low):
        assert not network.bound.loras  # type: ignore[attr-defined]
        with pytest.raises(KeyError):
            network.use(network.content, ((a.versions["transformer"].content, 1.0),))  # type: ignore[attr-defined]
        assert not network.bound.loras  # type: ignore[attr-defined]
    take_latents(rig, job)
    assert is_empty(rig)


def test_no_room_for_an_overlay(rig: Rig, pairs: tuple[Pair, Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """The task that wants it fails for want of memory; what is bound then are the untouched weights, for others and for
    a later try."""
    from stages import weights

    a, _ = pairs
    stage = load(rig)
    plain = denoise(rig, make_job(steps=4), stage)
    expected = with_pair(rig, stage, a)

    def no_room(*args: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 50.00 MiB")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "make_overlay", no_room)
        job = make_job(loras=[a.at(1.0)], steps=4)
        a.lend(stage)
        put_prompts(rig, job)
        stage.begin(job)
        with pytest.raises(torch.OutOfMemoryError):
            step(stage, job, 0)
        stage.drop(job.id)
    assert torch.equal(denoise(rig, make_job(steps=4), stage), plain)
    assert torch.equal(with_pair(rig, stage, a), expected)
    assert is_empty(rig)
