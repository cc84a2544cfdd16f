"""What a person is told about a value that does not fit."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
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
        ({"prompt": 5}, r"prompt must be str; got 5 \(int\)"),
        ({"prompt": "x", "height": "tall"}, r"height must be int; got 'tall' \(str\)"),
        ({"prompt": "x", "steps": 1.5}, r"steps must be int; got 1\.5 \(float\)"),
        ({"prompt": "x", "steps": True}, r"steps must be int; got True \(bool\)"),
        ({"prompt": "x", "fps": 0}, r"fps must be int >= 1; got 0 \(int\)"),
        ({"prompt": "x", "seed": -1}, r"seed must be int >= 0; got -1"),
        ({"prompt": "x", "seed": 2**63}, r"seed must be int <= 9223372036854775807; got 9223372036854775808"),
        ({"prompt": "x", "strength": 1.5}, r"strength must be float <= 1\.0; got 1\.5"),
        ({"prompt": "x", "guidance_scale": float("nan")}, r"guidance_scale must be float >= 0\.0; got nan"),
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


def test_one_value_where_a_list_is_meant() -> None:
    """A single LoRA in a configuration file: what a list of one looks like, quoted, as a comma would end a value."""
    with pytest.raises(BadConfig, match=r"lora must be a list, also of one: \['h,l:0\.8'\]; got 'h,l:0\.8'$"):
        decode_strictly(SystemParams, {"lora": "h,l:0.8"}, BadConfig, "system.yaml")


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
