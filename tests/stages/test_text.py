"""The text stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from engine.models import load_model
from ipc.architecture import TextEncoderConfig
from ipc.errors import BadCheckpoint, BadRequest, NumericalError
from ipc.messages.job import Job
from ipc.messages.stage import Run
from ipc.tensor_queue import TensorQueue
from ipc.tensors import slot_tensor
from stages.models.text_encoder import TextEncoder, build, encode
from stages.prompt import load_tokenizer
from stages.stage import Stage
from stages.text import KEPT_PROMPTS, TextStage
from stages.weights import Network
from tests.stages.reference import make_text_encoder, make_tokenizer
from tests.stages.rig import MODEL, Rig, is_empty, make_job

READ = 512
"""Tokens that every published model reads."""


class Parity(NamedTuple):
    """The text stage and Diffusers' pipeline over the same random encoder and the same tokenizer file."""

    rig: Rig
    stage: TextStage
    reference: WanPipeline

    def expected(self, prompt: str, negative: str) -> list[torch.Tensor]:
        """[512, text_dim] of each, as Diffusers gives them to the DiT."""
        with torch.inference_mode():
            return [e[0] for e in self.reference.encode_prompt(prompt, negative, max_sequence_length=READ)]


def make_byte_tokenizer(path: Path) -> Path:
    """Like that of UMT5, but tiny: Unigram pieces after `▁` for a space, bytes for what has no piece, `</s>` last."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("a", -3.0), ("▁a", -3.0), ("▁cat", -4.0)]
    pieces += [("猫", -4.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def parity(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parity]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = TextEncoderConfig(vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    encoder = build(config).requires_grad_(False)
    for parameter in encoder.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    file = make_byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    theirs = make_text_encoder(config)
    theirs.load_state_dict(encoder.state_dict(), strict=True)
    reference = WanPipeline(make_tokenizer(file), theirs, None, UniPCMultistepScheduler())
    transformer = msgspec.structs.replace(MODEL.transformer, text_len=READ)
    model = msgspec.structs.replace(MODEL, transformer=transformer, text_encoder=config)
    with Rig(checkpoint, model) as rig:
        start = rig.start(("text",), tokenizer=str(file))
        network = Network(encoder, "text_encoder", {}, {}, "random", torch.device("cpu"))
        yield Parity(rig, TextStage(start, rig.links(start), load_tokenizer(str(file)), network), reference)


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


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "&lt;b&gt;a &amp;amp; cat&lt;/b&gt;",
        "👩‍👩‍👧 a cat 🎬",
        "一只猫在草地上奔跑，画面清晰。",
        "ＦＵＬＬ　ｗｉｄｔｈ \t cafÃ©",
        " a " * 511,
    ],
)
def test_embeddings_equal_those_of_diffusers(parity: Parity, prompt: str) -> None:
    """Entities, emoji, Chinese, full-width forms, mojibake, a prompt of exactly 512 tokens; with the models' own
    negative prompt, or an empty one: the rows are within 1e-5 of those that Diffusers' pipeline hands to the DiT from
    512 padded and masked ones, and zero exactly where those are."""
    for negative in ("", load_model("wan2.1-t2v-1.3b").defaults.negative_prompt):
        actual = embed(parity.rig, parity.stage, make_job(prompt=prompt, negative_prompt=negative))
        for ours, theirs in zip(actual, parity.expected(prompt, negative), strict=True):
            assert ours.shape == theirs.shape == (READ, 16)
            assert float((ours - theirs).norm() / theirs.norm()) <= 1e-5
            assert torch.equal(ours.any(1), theirs.any(1))


def test_what_diffusers_cuts_off_is_refused(parity: Parity) -> None:
    """600 tokens where the model reads 512: Diffusers, as the original, keeps 511 of them and `</s>` and says nothing;
    here the request fails and says how long its prompt is, be it the negative one."""
    cut, whole = (parity.expected("a " * words, "")[0] for words in (599, 511))
    assert torch.equal(cut, whole)
    for prompts in ({"prompt": "a " * 599}, {"negative_prompt": "a " * 599}):
        with pytest.raises(BadRequest, match="600 tokens; the model reads at most 512"):
            embed(parity.rig, parity.stage, make_job(**prompts))
        parity.rig.reclaim("text")


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


def test_loading_is_told_to_its_end(rig: Rig) -> None:
    """While the weights are read the supervisor hears how far: at the end, that all bytes of the files were read."""
    rig.load("text")
    done, total = rig.loaded["text_encoder"]
    assert done == total > 0


def test_what_was_embedded_is_not_embedded_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text goes through the encoder once, whether it is a prompt or a negative prompt, and beside whatever other
    text; what is found in memory is what a new process makes."""
    encoded: list[int] = []

    def counted(encoder: TextEncoder, *texts: tuple[int, ...]) -> list[torch.Tensor]:
        encoded.append(len(texts))
        return encode(encoder, *texts)

    monkeypatch.setattr("stages.text.encode", counted)
    stage = rig.load("text")
    pairs = [("a red circle", "a"), ("blue", "a"), ("a red circle", "blue"), ("a", "a red circle"), ("left", "left")]
    found = [embed(rig, stage, make_job(prompt=p, negative_prompt=n, guidance_scale=3.0)) for p, n in pairs]
    assert encoded == [2, 1, 1]
    for (prompt, negative), kept in zip(pairs, found, strict=True):
        job = make_job(prompt=prompt, negative_prompt=negative, guidance_scale=3.0)
        assert all(torch.equal(a, b) for a, b in zip(kept, embed(rig, rig.load("text"), job), strict=True))


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
    stage._encoder.module.encoder.final_layer_norm.weight[0] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        embed(rig, stage, make_job())


def test_the_tokenizer_of_another_model_is_refused_before_the_weights_are_read(rig: Rig, tmp_path: Path) -> None:
    """264 pieces for an encoder that has 16: refused, with both numbers, and no component has begun to load."""
    file = make_byte_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(BadCheckpoint, match=r"has ids up to 263, expected at most 15.*; download https://"):
        rig.load("text", tokenizer=str(file))
    assert not rig.loaded
