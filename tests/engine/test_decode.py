"""What a person is told about a value that does not fit."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, strategies as st

from engine.decode import decode_strictly
from engine.params import SystemParams, UserParams
from ipc.errors import BadConfig, BadRequest


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"promt": "x"}, r"unknown field 'promt'; did you mean 'prompt'\?"),
        ({"prompt": "x", "guidence_scale": 3}, r"did you mean 'guidance_scale'\?"),
        ({"prompt": "x", "zzzzzz": 3}, r"unknown field 'zzzzzz'$"),
        ({}, r"lacks 'prompt'"),
        ({"prompt": 5}, r"prompt must be text, which it is in quotes: '5'; got 5 \(int\)$"),
        ({"prompt": "x", "height": "tall"}, r"height must be a whole number; got 'tall' \(str\)$"),
        ({"prompt": "x", "steps": 1.5}, r"steps must be a whole number; got 1\.5 \(float\)$"),
        ({"prompt": "x", "steps": True}, r"steps must be a whole number; got True \(bool\)$"),
        ({"prompt": "x", "fps": 0}, r"fps must be a whole number >= 1; got 0 \(int\)$"),
        ({"prompt": "x", "seed": -1}, r"seed must be a whole number >= 0; got -1"),
        (
            {"prompt": "x", "seed": 2**63},
            r"seed must be a whole number <= 9223372036854775807; got 9223372036854775808",
        ),
        ({"prompt": "x", "strength": 1.5}, r"strength must be a number <= 1\.0; got 1\.5"),
        ({"prompt": "x", "guidance_scale": float("nan")}, r"guidance_scale must be a number >= 0\.0; got nan"),
        ({"prompt": "x", "solver": "unipcc"}, r"one of unipc, dpm\+\+, euler; got 'unipcc'; did you mean 'unipc'\?"),
        ({"prompt": "x", "solver": 3}, r"solver must be one of"),
        ({"prompt": "x" * 10_000, "fps": "y" * 10_000}, r"^.{0,200}$"),
        ([], r"must be a table of named values, not \[\]"),
        (None, r"must be a table"),
        ({1: 2}, r"unknown field 1"),
    ],
)
def test_each_complaint_names_field_got_and_expected(fields: Any, says: str) -> None:
    """A request with one thing wrong is refused with a sentence about that thing."""
    with pytest.raises(BadRequest, match=says):
        decode_strictly(UserParams, fields, BadRequest, "the request")


def test_a_valid_request_is_decoded() -> None:
    """What fits comes out as the struct, integers becoming floats where floats are meant."""
    decoded = decode_strictly(UserParams, {"prompt": "x", "guidance_scale": 5}, BadRequest, "the request")
    assert decoded == UserParams(prompt="x", guidance_scale=5.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gpu_budget: 8", r"gpu_budget must be a number with its unit, such as 8GiB; got 8 (int)"),
        ("gpu_budget: 7.5", r"gpu_budget must be a number with its unit, such as 8GiB; got 7.5 (float)"),
        ("gpu_budget: [8GiB]", r"gpu_budget must be a number with its unit, such as 8GiB; got ['8GiB'] (list)"),
        ("device: 0", r"device must be auto, cpu, cuda or cuda:N, such as cuda:0; got 0 (int)"),
        ("device: off", r"device must be auto, cpu, cuda or cuda:N, such as cuda:0; got False (bool)"),
        ("dit_devices: cuda:0", r"dit_devices must be a list, also of one: ['cuda:0']; got 'cuda:0' (str)"),
        ("dit_devices: [cuda:0, 1]", r"dit_devices[1] must be cpu or cuda:N, such as cuda:0; got 1 (int)"),
        ("dit_devices: 0", r"dit_devices must be a list; got 0 (int)"),
        ("lora: 'h,l:0.8'", r"lora must be a list, also of one: ['h,l:0.8']; got 'h,l:0.8' (str)"),
        (
            "lora: [style: 0.8]",
            r"lora[0] must be FILE:STRENGTH, such as style.safetensors:0.8; got {'style': 0.8} (dict)",
        ),
        ("lora: {style: 0.8}", r"lora must be a list; got {'style': 0.8} (dict)"),
        ("allow_uids: 1000", r"allow_uids must be a list, also of one: [1000]; got 1000 (int)"),
        ("allow_uids: [1000, root]", r"allow_uids[1] must be a whole number; got 'root' (str)"),
        ("allow_uids: [-1]", r"allow_uids[0] must be a whole number >= 0; got -1 (int)"),
        ("model: 14", r"model must be text, which it is in quotes: '14'; got 14 (int)"),
        ("checkpoint: 2026-01-02", r"checkpoint must be text, which it is in quotes: '2026-01-02'; got datetime.date"),
        (
            "output_root: yes",
            r"output_root must be text, and words such as yes, no, on and off are text in quotes only",
        ),
        ("threads: '4'", r"threads must be a whole number, written without quotes: 4; got '4' (str)"),
        ("start_deadline: 1e2", r"start_deadline must be a number, written without quotes: 100.0; got '1e2' (str)"),
        ("threads: '-1'", r"threads must be a whole number; got '-1' (str)"),
        ("warm_spare: 1", r"warm_spare must be true or false; got 1 (int)"),
        ("max_queue:", r"max_queue must be a whole number; got None (NoneType)"),
        ("dit_devices: [" + "cpu, " * 300 + "]", r"dit_devices must be a list of length <= "),
    ],
)
def test_what_yaml_takes_for_something_else(text: str, says: str) -> None:
    """A value of a kind that is easily mistaken: the sentence says what is expected, with an example where the kind
    alone does not tell, and how to write what was meant, if that would be taken."""
    with pytest.raises(BadConfig, match=re.escape(f"system.yaml: {says}")):
        decode_strictly(SystemParams, yaml.safe_load(text), BadConfig, "system.yaml")


@pytest.mark.parametrize(
    "text", ["gpu_budget: 8GiB", "dit_devices: ['cuda:0']", "model: '14'", "start_deadline: 100.0"]
)
def test_what_is_advised_is_taken(text: str) -> None:
    assert decode_strictly(SystemParams, yaml.safe_load(text), BadConfig, "system.yaml")


def test_an_adapter_of_a_request_that_is_no_text() -> None:
    with pytest.raises(
        BadRequest, match=r"lora\[0\] must be NAME or NAME:STRENGTH, such as style:0\.8; got 7 \(int\)$"
    ):
        decode_strictly(UserParams, {"prompt": "x", "lora": [7]}, BadRequest, "the request")


@pytest.mark.parametrize(
    ("level", "says"),
    [("2", r"got '2'; write it as a number: 2$"), (-1, "got -1$"), (7, "got 7$"), ("aut", "did you mean 'auto'")],
)
def test_a_choice_of_numbers_and_words(level: object, says: str) -> None:
    """A number in quotes is not told to be what it is; one that is none is not told that it is near another."""
    with pytest.raises(BadConfig, match=r"memory_level must be one of auto, 0, 1, 2, 3; " + "(?:got .*; )?" + says):
        decode_strictly(SystemParams, {"memory_level": level}, BadConfig, "system.yaml")


def test_the_same_function_reads_system_parameters() -> None:
    """A mistyped key of a configuration file is a `BadConfig` with the nearest one."""
    with pytest.raises(BadConfig, match=r"system\.yaml has an unknown field 'placment'; did you mean 'placement'"):
        decode_strictly(SystemParams, {"placment": "fused"}, BadConfig, "system.yaml")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([field.name for field in msgspec.structs.fields(UserParams)]) | st.text(max_size=8)


@given(st.dictionaries(NAMES, JSON, max_size=6) | JSON)
def test_nothing_but_bad_request_comes_out(data: Any) -> None:
    """Whatever a client sends as parameters is decoded or refused with a short sentence."""
    try:
        decode_strictly(UserParams, data, BadRequest, "the request")
    except BadRequest as error:
        assert 0 < len(str(error)) < 400
