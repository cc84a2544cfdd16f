"""Numbers and rows as people read them."""

from __future__ import annotations

import shlex

import pytest

from engine.catalogue import transformer_parameters
from engine.display import count, seconds, size, summary
from engine.generate import Order, Outcome, suggestions
from engine.params import UserParams
from ipc.architecture import TransformerConfig
from ipc.messages import Done


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.042, "0.04 s"), (4.21, "4.2 s"), (42.3, "42 s"), (59.7, "60 s"), (422, "7 min 2 s"), (11_040, "3 h 4 min")],
)
def test_seconds(value: float, shown: str) -> None:
    """Two digits are enough."""
    assert seconds(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (73_400, "73 kB"), (28e9, "28.0 GB")]
)
def test_size(value: float, shown: str) -> None:
    """Powers of 1000."""
    assert size(value) == shown


def test_parameters_of_the_official_models() -> None:
    """The formula gives 1.4 billion for Wan2.1-T2V-1.3B and 14.3 for the 14B model, as their checkpoints have."""
    small = TransformerConfig(
        num_attention_heads=12, attention_head_dim=128, num_layers=30, ffn_dim=8960, text_dim=4096
    )
    large = TransformerConfig(
        num_attention_heads=40, attention_head_dim=128, num_layers=40, ffn_dim=13824, text_dim=4096
    )
    assert count(transformer_parameters(small)) == "1.4 B"
    assert count(transformer_parameters(large)) == "14.3 B"


def test_the_summary_of_a_video_that_is_gone() -> None:
    """It has no size; what loading took is said when there was any."""
    params = {"prompt": "a circle", "num_frames": 17, "fps": 8, "width": 96, "height": 96, "seed": 7}
    metadata = {"parameters": params, "seed": 7, "seconds": {"text": 0.01, "denoise": 3.2}}
    done = Done(id="0", path="/gone/a b.mp4", metadata=metadata)
    assert summary(done, 4.0, 0.0) == [
        "/gone/a b.mp4  96x96, 17 frames at 8 fps (2.1 s), 0 B",
        "seed 7, 4.0 s in all: text 0.01 s, denoise 3.2 s",
    ]
    assert summary(done, 9.0, 5.0)[1] == "seed 7, 9.0 s in all: load 5.0 s, text 0.01 s, denoise 3.2 s"


def test_suggestions_can_be_pasted_into_a_shell() -> None:
    """Every option that was given is in them, quoted; the largest seed is followed by 0; no prompt is cut."""
    prompt = "it's a $HOME `run` " * 10
    params = UserParams(prompt=prompt, steps=30, guidance_scale_2=2.0, metadata_json=True, output="/gone/a b.mp4")
    order = Order(params=params, model="wan-demo")
    done = Done(id="0", path="/gone/a b.mp4", metadata={"seed": 2**63 - 1})
    again, onward, serve = suggestions(order, Outcome(done, 4.0, 1.0, True))
    words = shlex.split(again, comments=True)
    assert words[:3] == ["engine", "generate", prompt]
    assert {"--steps", "30", "--guidance-scale-2", "2.0", "--metadata-json", "--model", "wan-demo"} <= set(words)
    assert words[words.index("--seed") + 1] == "0"
    assert words[words.index("--out") + 1] == "/gone/a b-2.mp4"
    assert "--video" in shlex.split(onward, comments=True)
    assert serve.startswith("engine serve")
