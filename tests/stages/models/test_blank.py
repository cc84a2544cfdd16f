"""Modules on the meta device: nothing is allocated or initialised, and building one is quick."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

from engine.models import load_model
from stages.models.blank import blank
from stages.models.transformer import WanTransformer

BUILD = """
import sys
from engine.models import load_model
from stages.models.blank import blank
from stages.models.image_encoder import ImageEncoder
from stages.models.text_encoder import TextEncoder
from stages.models.transformer import WanTransformer
from stages.models.vae import WanVae

model = load_model("wan2.1-i2v-14b-480p")
with {context}:
    TextEncoder(model.text_encoder), ImageEncoder(model.image_encoder)
    WanTransformer(model.transformer), WanVae(model.vae)
print("torch._dynamo" in sys.modules)
"""


def loads_the_compiler(context: str) -> bool:
    code = f"import torch\n{BUILD.format(context=context)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return {"True\n": True, "False\n": False}[done.stdout]


def test_the_compiler_is_not_loaded() -> None:
    """It takes seconds, which a restarted stage has not."""
    assert not loads_the_compiler("blank()")
    assert loads_the_compiler('torch.device("meta")')  # else `blank` would not be needed


def test_everything_is_on_meta_and_has_its_shape() -> None:
    with blank():
        model = WanTransformer(load_model("wan2.1-t2v-1.3b").transformer)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert model.scale_shift_table.shape == (1, 2, 1536)


def test_outside_modules_are_initialised() -> None:
    with blank():
        nn.Linear(8, 8)
    torch.manual_seed(0)
    assert nn.Linear(8, 8).weight.std() > 0.01
