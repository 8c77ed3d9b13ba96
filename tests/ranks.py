"""Runs a function on N gloo ranks: forked from this process after its imports, over a file store, without ports.

A rank that raises fails the test with its traceback; a rank that does not end in time is killed and reported as a hang.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # five seconds of imports, once before the fork instead of on every rank
import pytest
import torch
import torch.distributed as dist
from tqdm import tqdm

from ds_seqpar.comm import exchange

ON_GPU = os.environ.get("DS_SEQPAR_TEST_DEVICE") == "cuda"
SHARE_ONE_GPU = os.environ.get("DS_SEQPAR_TEST_ONE_GPU") == "1"
if ON_GPU:
    exchange._LEAST_BYTES = 0  # tiny models, too, are exchanged by the copy engines
__all__ = ["RankError", "live_tensors", "run_ranks"]


class RankError(AssertionError):
    """What went wrong on the ranks: `errors[rank]` is the traceback, for one that did not end where it stood and "hang", or None."""

    def __init__(self, errors: list[str | None]) -> None:
        self.errors = errors
        super().__init__("\n".join(f"--- rank {i} ---\n{e}" for i, e in enumerate(errors) if e))


def run_ranks(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 300.0,
    deepspeed: bool = True,
    one_gpu: bool = False,
) -> list[Any]:
    """Calls `function(*args)` on `world` ranks; returns what each returned.

    `deepspeed`: initialise deepspeed.comm too. `one_gpu`: the ranks share the first GPU, read each other's memory in it by the
    copy engines and otherwise talk over gloo; DS_SEQPAR_TEST_ONE_GPU=1 says so for every test.
    """
    one_gpu = one_gpu or (ON_GPU and SHARE_ONE_GPU)
    if one_gpu and not (ON_GPU and torch.cuda.device_count()):
        pytest.skip("needs a GPU: set DS_SEQPAR_TEST_DEVICE=cuda where there is one")
    if ON_GPU and not one_gpu and world > torch.cuda.device_count():
        pytest.skip(f"needs {world} GPUs, this machine has {torch.cuda.device_count()}; on the CPU the test runs")
    if ON_GPU and torch.cuda.is_initialized():
        pytest.skip(
            "an earlier test started CUDA in this process, from which ranks cannot be forked any more: "
            "run these tests in a pytest process of their own"
        )
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, world, folder, function, args, deepspeed, one_gpu), daemon=True)
            for rank in range(world)
        ]
        # What this process holds stays out of the ranks' collections, which would touch, and so copy, all of its pages.
        gc.freeze()
        try:
            for process in ranks:
                process.start()
        finally:
            gc.unfreeze()
        deadline = time.monotonic() + timeout
        failed_at = None
        while any(p.is_alive() for p in ranks) and time.monotonic() < deadline:
            time.sleep(0.005)
            if failed_at is None and any(p.exitcode for p in ranks):
                failed_at = time.monotonic()
                deadline = min(deadline, failed_at + 20.0)  # the others fail on their own, or hang and are named
        results: list[Any] = [None] * world
        errors: list[str | None] = [None] * world
        for rank, process in enumerate(ranks):
            if process.is_alive():
                errors[rank] = _where(process, f"{folder}/stack{rank}") + "hang"
                process.kill()
            process.join()
            path = f"{folder}/result{rank}"
            if os.path.exists(path):
                with open(path, "rb") as file:
                    results[rank], errors[rank] = pickle.load(file)
            elif errors[rank] is None:
                errors[rank] = f"exit code {process.exitcode}"
        if any(errors):
            raise RankError(errors)
        return results


def live_tensors() -> list[torch.Tensor]:
    """All tensors that something still holds; gloo's own threads hold those of the last collective a moment longer, which is waited for."""
    time.sleep(0.1)
    gc.collect()
    return [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]


def _where(process: Any, stack: str) -> str:
    """Where a rank that does not end stands, if it can still say so."""
    if os.path.exists(stack):
        os.kill(process.pid, signal.SIGUSR1)
        process.join(1.0)
        with open(stack) as file:
            return file.read()
    return "before its first line\n"


def _own_lock(bar: type[tqdm]) -> None:
    """For this rank's progress bars of every kind: their first is shared with all forks, and a rank that is killed may hold it."""
    bar.set_lock(threading.RLock())
    for kind in bar.__subclasses__():
        _own_lock(kind)


def _rank(
    rank: int, world: int, folder: str, function: Callable[..., Any], args: Any, deepspeed: bool, one_gpu: bool
) -> None:
    torch.set_num_threads(1)
    _own_lock(tqdm)
    result, error = None, None
    gpu = 0 if one_gpu else rank
    stack = open(f"{folder}/stack{rank}", "w")  # until the process ends
    faulthandler.register(signal.SIGUSR1, stack)
    try:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(gpu), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )
        backend = "nccl" if ON_GPU and not one_gpu else "gloo"
        if ON_GPU:
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = str(int(one_gpu))
            torch.cuda.set_device(gpu)
        if one_gpu:
            # Which no user's run does; a group of one has nobody to read from all the same.
            exchange.Exchange._why_not = lambda self, _, everyone: None if len(everyone) > 1 else "one rank"  # type: ignore[method-assign]
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
        if deepspeed:
            import deepspeed.comm

            # Optional and slow to build.
            sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]  # optional, slow to build
            deepspeed.comm.init_distributed(backend)
        result = function(*args)
    except BaseException as problem:
        # Its frames are kept until the process ends: after a failure on a GPU, what they hold cannot be freed without an abort.
        error, _kept = traceback.format_exc(), problem
    with open(f"{folder}/partial{rank}", "wb") as file:
        pickle.dump((result, error), file)
    os.rename(f"{folder}/partial{rank}", f"{folder}/result{rank}")
    if error and ON_GPU:  # a rank that is still making a group with this one raises an error of its own otherwise
        time.sleep(1.0)
    os._exit(1 if error else 0)
