"""The `ds_seqpar` object of the JSON: every field checked, every error one that names the field, the value and the way out."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_seqpar import ConfigError, SeqParConfig
from ds_seqpar.config import Overlap, Recompute

DEFAULTS = dict(
    enabled=True, sequence_parallel=True, recompute=Recompute.NONE, loss_chunk_tokens=4096, overlap=Overlap.AUTO, verify=None,
    replica_check_interval=0, timeout_s=0, memory_check=True, plan={},
)  # fmt: skip
VALID: dict[str, list[Any]] = {
    "tp_size": [1, 2, 3, 64],
    "enabled": [True, False],
    "sequence_parallel": [True, False],
    "recompute": ["none", "selective", "full"],
    "loss_chunk_tokens": [1, 2048, 10**9],
    "overlap": ["auto", "off"],
    "verify": [True, False],
    "replica_check_interval": [0, 1, 100],
    "timeout_s": [0, 1, 600],
    "memory_check": [True, False],
    "plan": [{"model.layers.*.mlp": "whole"}, {"a": "colwise", "b": "rowwise"}],
}
NO_INTEGER: list[Any] = [0, -1, 1.0, 2.5, "2", True, False, None, [2], {"tp_size": 2}]
NO_BOOL: list[Any] = [0, 1, "true", "", None, [], 1.0]
NO_CHOICE: list[Any] = ["", "NONE", "Full", "everything", True, False, None, 0, ["full"], {}]
WRONG: dict[str, list[Any]] = {
    "tp_size": NO_INTEGER,
    "enabled": NO_BOOL,
    "sequence_parallel": NO_BOOL,
    "recompute": NO_CHOICE,
    "loss_chunk_tokens": NO_INTEGER,
    "overlap": NO_CHOICE,
    "verify": NO_BOOL,
    "replica_check_interval": [value for value in NO_INTEGER if value != 0 or isinstance(value, bool)],
    "timeout_s": [value for value in NO_INTEGER if value != 0 or isinstance(value, bool)],
    "memory_check": NO_BOOL,
    "plan": [
        {},
        [],
        "colwise",
        None,
        True,
        0,
        {"a": ""},
        {"": "colwise"},
        {"a": 1},
        {1: "colwise"},
        {"a": ["colwise"]},
    ],
}


def test_every_field_is_tested() -> None:
    names = [field.name for field in fields(SeqParConfig)]
    assert list(VALID) == list(WRONG) == names


def test_the_smallest_object_gives_the_defaults() -> None:
    config = SeqParConfig.from_json({"tp_size": 2})
    assert config == SeqParConfig(tp_size=2, **DEFAULTS)  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        config.tp_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in VALID.items() for value in values])
def test_valid_values_are_kept(name: str, value: Any) -> None:
    section = {"tp_size": 2, name: value}
    config = SeqParConfig.from_json(section)
    assert getattr(config, name) == value
    if name in ("recompute", "overlap"):
        assert isinstance(getattr(config, name), Recompute if name == "recompute" else Overlap)
    assert section == {"tp_size": 2, name: value}, "the caller's object is not changed"


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_values_are_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        SeqParConfig.from_json({"tp_size": 2, name: value})
    message = str(caught.value)
    assert f'"ds_seqpar.{name}"' in message and repr(value) in message
    assert "must be" in message


@pytest.mark.parametrize("section", [None, True, 2, "2", [2], ["tp_size"], 1.5])
def test_a_section_that_is_no_object_is_refused(section: object) -> None:
    with pytest.raises(ConfigError, match=r'"ds_seqpar" must be an object such as \{"tp_size": 2\}'):
        SeqParConfig.from_json(section)


def test_unknown_fields_are_refused_and_the_known_ones_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown field\(s\) \['tp_sise', 'sp'\]; known fields: \['tp_size'"):
        SeqParConfig.from_json({"tp_sise": 2, "sp": True})


def test_tp_size_is_required_unless_disabled() -> None:
    with pytest.raises(ConfigError, match=r'"ds_seqpar\.tp_size" is missing'):
        SeqParConfig.from_json({})
    with pytest.raises(ConfigError, match=r'"ds_seqpar\.tp_size" is missing'):
        SeqParConfig.from_json({"enabled": True})
    assert not SeqParConfig.from_json({"enabled": False}).enabled
    assert SeqParConfig.from_json({"enabled": False, "tp_size": 4}).tp_size == 4
    with pytest.raises(ConfigError, match="tp_size"):
        SeqParConfig.from_json({"enabled": False, "tp_size": "four"})


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["full", "none", "auto", "off"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
_names = st.sampled_from([*VALID, "tp", ""])


@given(
    _json | st.dictionaries(_names, _json, max_size=5) | st.dictionaries(st.integers() | st.none(), _json, max_size=2)
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_whatever_the_json_a_config_error_or_a_valid_config(section: object) -> None:
    try:
        config = SeqParConfig.from_json(section)
    except ConfigError as error:
        assert "ds_seqpar" in str(error)
        return
    assert isinstance(config.tp_size, int) and config.tp_size >= 1 and config.loss_chunk_tokens >= 1
    assert isinstance(config.recompute, Recompute) and isinstance(config.overlap, Overlap)
    for name in ("enabled", "sequence_parallel", "verify"):
        assert isinstance(getattr(config, name), bool)
    assert config.replica_check_interval >= 0 and not isinstance(config.replica_check_interval, bool)
    assert not isinstance(config.tp_size, bool)


@given(
    st.fixed_dictionaries(
        {"tp_size": st.sampled_from(VALID["tp_size"])},
        optional={n: st.sampled_from(v) for n, v in VALID.items() if n != "tp_size"},
    )
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_mix_of_valid_values_is_accepted(section: dict[str, Any]) -> None:
    config = SeqParConfig.from_json(section)
    assert {name: getattr(config, name) for name in section} == section
