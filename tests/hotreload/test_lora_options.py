"""`--lora FILE[,LOW_FILE][:STRENGTH]`: what is understood, and which transformer each file goes into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hotreload.lora_options import LoraOption, attach_loras, parse_lora
from ipc.errors import BadCheckpoint, BadConfig
from ipc.messages.weights import Component, Lora
from tests.hotreload.tiny import a_component, build, random_tensors, save

KEY = "blocks.0.attn1.to_q"
EXPERTS = ("transformer", "transformer_2")


def attach(components: dict[str, Component], options: list[str]) -> dict[str, Component]:
    """To all transformers of a model."""
    return attach_loras(components, options, [name for name in EXPERTS if name in components])


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("a.safetensors", LoraOption(("a.safetensors",), 1.0)),
        ("a.safetensors:0.8", LoraOption(("a.safetensors",), 0.8)),
        ("/x/a.safetensors:-1", LoraOption(("/x/a.safetensors",), -1.0)),
        ("c:/b:c/a.safetensors", LoraOption(("c:/b:c/a.safetensors",), 1.0)),
        ("c:/b:c/a.safetensors:0", LoraOption(("c:/b:c/a.safetensors",), 0.0)),
        ("a, b.safetensors:2", LoraOption(("a, b.safetensors",), 2.0)),
        ("h.safetensors,l.safetensors:1e-1", LoraOption(("h.safetensors", "l.safetensors"), 0.1)),
        ("h.safetensors, l.safetensors:0.5", LoraOption(("h.safetensors", "l.safetensors"), 0.5)),
        (" h.safetensors ,l.safetensors ", LoraOption(("h.safetensors", "l.safetensors"), 1.0)),
        ("h.safetensors,l.safetensors", LoraOption(("h.safetensors", "l.safetensors"), 1.0)),
    ],
)
def test_options_are_understood(text: str, option: LoraOption) -> None:
    """Colons and commas in paths, signs, exponents, blanks around files, no strength."""
    assert parse_lora(text) == option


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a.safetensors:", "'' is not a strength"), ("a.safetensors:strong", "'strong' is not a strength"),
        ("a.safetensors:nan", "must be from -10 to 10, got nan"), ("a.safetensors:inf", "got inf"),
        ("a.safetensors:10.5", "got 10.5"), ("a.pt:1", "each ending in .safetensors"), ("", "expected FILE"),
        (":1", "expected FILE"), ("a.safetensors,b.safetensors,c.safetensors:1", "expected FILE or HIGH_FILE,LOW_FILE"),
        ("/x/h.safetensors:1,/x/l.safetensors:1", "one strength, at the end, is for both files"),
        ("h.safetensors:1,l.safetensors", "one strength, at the end, is for both files"),
        ("a.safetensors,:1", "expected FILE"), ("a.safetensors,b.pt", "expected FILE"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(text: str, problem: str) -> None:
    """No number, no finite number, out of range, other files, too many files: `BadConfig` with the option in it."""
    with pytest.raises(BadConfig) as refused:
        parse_lora(text)
    assert str(refused.value).startswith(f"LoRA {text!r}: ")
    assert problem in str(refused.value)


@pytest.fixture
def components(tmp_path: Path) -> dict[str, Component]:
    file = save(tmp_path / "base.safetensors", random_tensors(build("transformer")))
    return {name: a_component(name, file) for name in (*EXPERTS, "vae")}


def lora(path: Path, *prefixes: str) -> str:
    """A good file with keys for each of `prefixes`."""
    keys = {f"{prefix}{KEY}.{half}.weight": shape for prefix in prefixes or ("",)
            for half, shape in (("lora_A", (2, 24)), ("lora_B", (24, 2)))}  # fmt: skip
    return str(save(path, {key: torch.ones(shape) for key, shape in keys.items()}))


def without_second(components: dict[str, Component]) -> dict[str, Component]:
    return {name: component for name, component in components.items() if name != "transformer_2"}


def test_a_file_goes_into_the_transformer(tmp_path: Path, components: dict[str, Component]) -> None:
    """One transformer, two options: both are attached, in order, and nothing else; without options nothing changes."""
    single = without_second(components)
    a, b = lora(tmp_path / "a.safetensors"), lora(tmp_path / "b.safetensors", "transformer.")
    attached = attach(single, [f"{a}:0.5", b])
    assert attached["transformer"].loras == [Lora(file=a, strength=0.5), Lora(file=b, strength=1.0)]
    assert attached["vae"] == single["vae"]
    assert attached.keys() == single.keys()
    assert attach(single, []) == single


def test_each_expert_gets_its_file(tmp_path: Path, components: dict[str, Component]) -> None:
    """HIGH,LOW with any prefixes; or one PEFT file with both prefixes, which each expert reads its own part of."""
    high, low = lora(tmp_path / "h.safetensors", "transformer."), lora(tmp_path / "l.safetensors", "transformer_2.")
    both = lora(tmp_path / "both.safetensors", "transformer.", "transformer_2.")
    attached = attach(components, [f"{high},{low}:0.5", f"{both}:2"])
    files = [[lora.file for lora in attached[name].loras] for name in EXPERTS]
    assert files == [[high, both], [low, both]]


def test_the_number_of_files_must_be_that_of_the_experts(tmp_path: Path, components: dict[str, Component]) -> None:
    """One file for two experts, two for one, both experts in one file for a single transformer or in a pair."""
    plain, both = lora(tmp_path / "a.safetensors"), lora(tmp_path / "b.safetensors", "transformer.", "transformer_2.")
    with pytest.raises(
        BadConfig, match=r"a\.safetensors is for one transformer, but the model has two experts; .*HIGH,LOW"
    ):
        attach(components, [plain])
    with pytest.raises(BadConfig, match=r"two files are for a model with two experts; this one has one transformer"):
        attach(without_second(components), [f"{plain},{plain}:1"])
    with pytest.raises(BadConfig, match=r"b\.safetensors holds both experts .* the model has one transformer"):
        attach(without_second(components), [both])
    with pytest.raises(BadConfig, match=r"b\.safetensors holds both experts .* give it alone"):
        attach(components, [f"{plain},{both}"])


def test_experts_in_the_wrong_order_are_refused(tmp_path: Path, components: dict[str, Component]) -> None:
    """By the names of the files, or by the prefix of the keys."""
    low = lora(tmp_path / "wan2.2_t2v_A14b_low_noise_rank64.safetensors")
    high = lora(tmp_path / "wan2.2_t2v_A14b_high_noise_rank64.safetensors")
    with pytest.raises(BadConfig, match="the low-noise file comes first; the order is HIGH,LOW"):
        attach(components, [f"{low},{high}"])
    assert attach(components, [f"{high},{low}"])["transformer_2"].loras == [Lora(file=low, strength=1.0)]
    second = lora(tmp_path / "x.safetensors", "transformer_2.")
    with pytest.raises(BadCheckpoint, match=r"x\.safetensors is for the low-noise expert"):
        attach(components, [f"{second},{low}"])


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, components: dict[str, Component]) -> None:
    """Not there, or for another model: the file, as it was given, and the key, before any process is started."""
    single, gone = without_second(components), tmp_path / "x" / "gone.safetensors"
    with pytest.raises(BadCheckpoint) as refused:
        attach(single, [f"{gone}:0.5"])
    assert str(refused.value) == f"LoRA {gone} cannot be read: No such file or directory"
    other = save(tmp_path / "o.safetensors", {"blocks.99.attn1.to_q.lora_A.weight": torch.ones(2, 24)})
    with pytest.raises(BadCheckpoint, match=r"LoRA .*o\.safetensors does not fit the model: .*blocks\.99"):
        attach(single, [str(other)])


def test_a_path_that_is_not_utf8_is_refused(tmp_path: Path, components: dict[str, Component]) -> None:
    """The byte FF in a good file's name."""
    (tmp_path / "\udcff").mkdir()
    file = lora(tmp_path / "a.safetensors")
    bad = Path(file).rename(tmp_path / "\udcff" / "a.safetensors")
    with pytest.raises(BadConfig, match=r"udcff/a\.safetensors': its path is not UTF-8.*; rename"):
        attach(without_second(components), [str(bad)])


@pytest.mark.parametrize("given", ["~nosuchuser/x.safetensors", "a\0b.safetensors"])
def test_a_path_that_cannot_be_one_is_refused(tmp_path: Path, given: str) -> None:
    """The home of a user who is not there, a NUL: the option is named."""
    base = save(tmp_path / "diffusion_pytorch_model.safetensors", random_tensors(build("transformer")))
    with pytest.raises(BadConfig, match=r"^LoRA '"):
        attach({"transformer": a_component("transformer", base)}, [given])
