"""The checkpoint that ships: its size, its precision, and that it shows what the demo's prompt says."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from tools.demo_export import architecture_of, load
from tools.demo_judge import judge
from tools.demo_networks import DEMO
from tools.demo_sampling import Sampling, generate
from tools.demo_scenes import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES

CHECKPOINT = Path(__file__).parents[2] / "configs" / "demo"
PROMPT = "a red circle moves left on a black background"


def test_size_and_precision() -> None:
    """Both revisions together take at most 16 MB, and every tensor is float16."""
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 4
    for path in weights:
        with safe_open(path, framework="pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float16}  # noqa: SIM118


def test_numbers_are_those_of_the_recipe() -> None:
    """The directory's configs describe the architecture that the training script builds."""
    architecture = architecture_of(CHECKPOINT)
    assert architecture.transformer == DEMO.transformer
    assert architecture.text_encoder == DEMO.text_encoder
    assert architecture.vae.base_dim == DEMO.vae.base_dim and architecture.vae.dim_mult == DEMO.vae.dim_mult
    assert min(architecture.vae.latents_std) > 0.5


@pytest.mark.parametrize("revision", [1, 2])
def test_demo_prompt_shows_its_scene(revision: int) -> None:
    """With the defaults, the demo prompt becomes a red circle that goes left over black; revision 2 outlines it."""
    networks = load(CHECKPOINT, architecture_of(CHECKPOINT), None if revision == 1 else CHECKPOINT / "revision-2")
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer" / "tokenizer.json"))
    verdict = judge(generate(networks, tokenizer, [PROMPT], Sampling()))
    assert int(verdict.count) == 1
    assert SHAPES[int(verdict.shape[0, 0])] == "circle"
    assert COLOURS[int(verdict.colour[0, 0])] == "red"
    assert DIRECTIONS[int(verdict.direction[0, 0])] == "left"
    assert BACKGROUNDS[int(verdict.background)] == "black"
    assert float(verdict.ink) < 0.05 if revision == 1 else float(verdict.ink) > 0.5
