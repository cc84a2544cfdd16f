"""The text stage."""

from __future__ import annotations

import pytest
import torch

from ipc.errors import BadRequest, NumericalError
from ipc.messages import Job, Run
from ipc.tensor_queue import TensorQueue
from ipc.tensors import slot_tensor
from stages.stage import Stage
from stages.text import KEPT_PROMPTS, TextStage
from tests.stages.rig import MODEL, Rig, is_empty, make_job


def embed(rig: Rig, stage: Stage, job: Job) -> list[torch.Tensor]:
    """Run the quantum; what the dit would find, [text_len, text_dim] each. The slots are free afterwards."""
    stage.begin(job)
    stage.step(Run(id=job.id, phase="text", index=0))
    stage.drop(job.id)
    queue = rig.memory.queues["prompts"]
    with TensorQueue.attach(queue.spec, queue.fds, "consumer", 1) as dit:
        found = [slot_tensor(dit.take(job.id, i, 1)).clone() for i in range(2) if queue.holds(job.id, i)]
        dit.release(job.id)
    return found


def test_a_prompt_becomes_embeddings_with_zero_rows_behind(rig: Rig) -> None:
    """Prompt and negative prompt: real rows, then zeros, as many as the model reads; the same again from memory."""
    stage = rig.load("text")
    prompt, negative = embed(rig, stage, make_job(prompt="a red circle", negative_prompt=""))
    assert prompt.shape == (MODEL.transformer.text_len, MODEL.transformer.text_dim)
    assert bool((prompt[:4].abs().sum(1) > 0).all()) and not prompt[4:].any()
    assert bool(negative[0].any()) and not negative[1:].any()
    assert torch.equal(prompt, embed(rig, stage, make_job(prompt=" a  red circle"))[0])
    assert torch.equal(prompt, embed(rig, rig.load("text"), make_job(prompt="a red circle"))[0])
    assert is_empty(rig)


def test_no_negative_prompt_without_guidance(rig: Rig) -> None:
    """Guidance 1 puts the prompt alone; guidance of the second expert alone puts both."""
    stage = rig.load("text")
    assert len(embed(rig, stage, make_job(guidance_scale=1.0, guidance_scale_2=1.0))) == 1
    assert len(embed(rig, stage, make_job(guidance_scale=1.0, guidance_scale_2=3.0))) == 2


def test_putting_twice_changes_nothing(rig: Rig) -> None:
    """The process died after it put the embeddings and before it could tell: the quantum runs again, and the queue
    holds each embedding once."""
    job = make_job()
    for _ in range(2):
        stage = rig.load("text")
        stage.begin(job)
        stage.step(Run(id=job.id, phase="text", index=0))
        rig.reclaim("text")
    assert rig.depths()["prompts"] == 2
    assert rig.memory.check_integrity() == []


def test_few_embeddings_are_kept(rig: Rig) -> None:
    """After more prompts than are kept, the memory of the stage is that of the kept ones, each with its real rows."""
    stage = rig.load("text")
    words = ["a", "red", "blue", "circle", "square", "moves", "left", "right", "on", "black"]
    for first in words:
        for second in words:
            embed(rig, stage, make_job(prompt=f"{first} {second}", guidance_scale=1.0, guidance_scale_2=1.0))
    assert stage.state().bytes == KEPT_PROMPTS * 3 * MODEL.transformer.text_dim * 4
    assert stage.state().tasks == frozenset()


def test_a_prompt_that_is_too_long_fails_the_request(rig: Rig) -> None:
    """Thirteen tokens where the model reads twelve: `BadRequest`, and nothing is put."""
    stage = rig.load("text")
    with pytest.raises(BadRequest, match="13 tokens"):
        embed(rig, stage, make_job(prompt="a " * 12))
    assert is_empty(rig)


def test_values_that_are_not_finite_fail_the_request(rig: Rig) -> None:
    """Weights with a NaN: `NumericalError`."""
    stage = rig.load("text")
    assert isinstance(stage, TextStage)
    stage._encoder.encoder.final_layer_norm.weight[0] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        embed(rig, stage, make_job())
