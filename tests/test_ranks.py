"""Ranks are forked, so no test that starts CUDA in pytest's own process may come before one that starts ranks."""

from __future__ import annotations

import os
import runpy
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import torch
from tqdm import tqdm
from tqdm.auto import tqdm as auto_tqdm
from tqdm.std import TqdmDefaultWriteLock


def test_ranks_are_not_forked_from_a_process_that_started_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "ON_GPU", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(pytest.skip.Exception, match="in a pytest process of their own"):
        ranks.run_ranks(2, list)


def test_tests_of_kernels_come_last() -> None:
    items = [
        SimpleNamespace(path=Path("tests", name)) for name in ("kernels/a.py", "comm/b.py", "kernels/c.py", "d.py")
    ]
    runpy.run_path(str(Path(__file__).with_name("conftest.py")))["pytest_collection_modifyitems"](items)
    assert [item.path.name for item in items] == ["b.py", "d.py", "a.py", "c.py"]


def _one_waits() -> None:
    if torch.distributed.get_rank() == 1:
        time.sleep(600)


def test_a_rank_that_does_not_end_is_named_with_the_line_it_stands_at() -> None:
    with pytest.raises(ranks.RankError) as failed:
        ranks.run_ranks(2, _one_waits, timeout=10, deepspeed=False)
    finished, hanging = failed.value.errors
    assert finished is None
    assert hanging.endswith("hang") and "_one_waits" in hanging


def _dies_in_a_bar(kind: type[tqdm]) -> None:
    kind.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def _shows_a_bar(kind: type[tqdm]) -> int:
    return len(list(kind(range(3))))


@pytest.mark.parametrize("kind", [tqdm, auto_tqdm])  # transformers' are of the second
def test_a_rank_that_is_killed_while_it_shows_a_bar_stops_no_later_one(
    kind: type[tqdm], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which ranks are forked with, as after a bar of pytest's own process: a kind that came first has one of its own.
    monkeypatch.setattr(kind, "_lock", TqdmDefaultWriteLock(), raising=False)
    with pytest.raises(ranks.RankError, match="exit code -9"):
        ranks.run_ranks(1, _dies_in_a_bar, kind, deepspeed=False)
    assert ranks.run_ranks(1, _shows_a_bar, kind, timeout=20, deepspeed=False) == [3]


def _seen_after_a_sum(times: int) -> int:
    seen = 0
    for _ in range(times):
        summed = torch.ones(250_007)
        torch.distributed.all_reduce(summed)
        del summed
        seen += any(x.numel() == 250_007 for x in ranks.live_tensors())
    return seen


@pytest.mark.skipif(ranks.ON_GPU, reason="gloo's threads")
def test_what_only_gloo_holds_still_is_not_among_the_live_tensors() -> None:
    assert ranks.run_ranks(2, _seen_after_a_sum, 12, deepspeed=False) == [0, 0]
