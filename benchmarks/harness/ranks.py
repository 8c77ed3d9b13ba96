"""Runs a function on N ranks, forked from this process after its slow imports and before any CUDA call of its own."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["Ranks", "import_once"]


def import_once(tiny: bool) -> None:
    """Sets what must be set before torch, then imports what every arm needs, once for all ranks."""
    os.environ.setdefault("OMP_NUM_THREADS", "1" if tiny else "8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast stays off, also in symmetric memory
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", tempfile.mkdtemp(prefix="extensions"))
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking whether there are GPUs must not start CUDA before a fork
    if tiny:
        os.environ["DS_ACCELERATOR"], os.environ["CUDA_VISIBLE_DEVICES"] = "cpu", ""
    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # imported by every engine, and slow
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    if tiny:
        torch.set_num_threads(1)


class Ranks:
    """N forked ranks that run `function(*args)`; their output goes to `log`, a traceback to `error(rank)`."""

    def __init__(
        self,
        world: int,
        function: Callable[..., None],
        *args: Any,
        log: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("fork")
        self.processes = [
            context.Process(target=_rank, args=(rank, world, self.folder.name, log, environment or {}, function, args))
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def alive(self) -> bool:
        """Whether a rank still runs."""
        return any(process.is_alive() for process in self.processes)

    def failed(self) -> bool:
        """Whether a rank has ended with an error."""
        return any(process.exitcode for process in self.processes)

    def end(self) -> None:
        """Kills what still runs, and what the ranks started and left."""
        for process in self.processes:
            if process.pid:
                with contextlib.suppress(ProcessLookupError):  # no group: it left nothing, or has yet to make one
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()

    def error(self) -> str:
        """The traceback of the rank that failed first, or how it ended."""
        texts = [(path.stat().st_mtime, path.read_text()) for path in Path(self.folder.name).glob("error*")]
        if texts:
            return min(texts)[1]
        codes = [process.exitcode for process in self.processes]
        return f"exit codes {codes}" if any(codes) else ""

    def wait(self, seconds: float, grace: float = 10.0) -> bool:
        """Waits until all ranks have ended, at most `seconds`, or `grace` after one failed. True if all ended well."""
        for _ in self._polls(seconds, grace):
            pass
        good = not self.alive() and not self.failed()
        self.end()
        return good

    def _polls(self, seconds: float, grace: float) -> Iterator[None]:
        deadline = time.monotonic() + seconds
        failed = False
        while self.alive() and time.monotonic() < deadline:
            if self.failed() and not failed:
                failed, deadline = True, min(deadline, time.monotonic() + grace)
            time.sleep(0.02)
            yield


def _rank(
    rank: int, world: int, folder: str, log: Path, environment: dict[str, str], function: Callable[..., None], args: Any
) -> None:
    os.setsid()  # a group of its own, so that compile workers end with it
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the launcher, however that ends
    code = 1
    try:
        with open(log, "a", buffering=1) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        local = dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )
        os.environ.update({**local, **environment})
        _join(rank, world, folder)
        function(*args)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        Path(folder, f"error{rank}").write_text(traceback.format_exc())
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)  # no clean-up of communicators: the other rank may be dead


def _join(rank: int, world: int, folder: str) -> None:
    import deepspeed.comm
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]  # a minute to compile, unused here
    backend = "nccl" if on_gpu else "gloo"
    device = torch.device("cuda", rank) if on_gpu else None
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=world, device_id=device
    )
    deepspeed.comm.init_distributed(backend)
