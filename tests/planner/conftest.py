"""A plan's traces are made once for all tests: most of them plan the same tiny model."""

from __future__ import annotations

from typing import Any

import pytest

from ds_seqpar.planner import choices

_plain = choices.trace_step
_traces: dict[str, Any] = {}


def _remembered(config: Any, key: Any, **options: Any) -> Any:
    name = f"{config.to_json_string(use_diff=False)} {key} {sorted(options.items())}"
    if name not in _traces:
        _traces[name] = _plain(config, key, **options)
    return _traces[name]


@pytest.fixture(autouse=True)
def remembered_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "trace_step", _remembered)
