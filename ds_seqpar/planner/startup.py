"""Compares a run with its plan: what the GPU held and reached in the second step against what the planner predicts.

The prediction is made in a process of its own, beside the training, that sees no GPU: planning needs process groups that are not
there. It is read when it is there; nothing waits for it. The first step allocates what stays (the optimizer's moments, workspaces),
so the second one is compared.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config import SeqParConfig
from ..errors import SeqParError

__all__ = ["CudaMeter", "MemoryCheck", "Meter", "predict_memory", "question_of"]

GIB = 2.0**30
TOLERANCE = 0.10
FEW = 1 << 28
"""Bytes below which a difference is nothing to warn of."""
ANSWER = "PREDICTED "


class Meter(Protocol):
    """What counts a GPU's memory, in bytes."""

    def allocated(self) -> int:
        """Now."""

    def peak(self) -> int:
        """The highest since the process began."""


@dataclass(frozen=True)
class CudaMeter:
    """torch's allocator."""

    device: torch.device

    def allocated(self) -> int:
        """Now."""
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """The highest since the process began, or since the user reset it; resetting it here would spoil the user's own figure."""
        return torch.cuda.max_memory_allocated(self.device)


class MemoryCheck:
    """Watches an engine's first two steps on one rank; `after_step` logs the comparison once it and the prediction are there.

    `question` is what `predict_memory` takes, but for the shape of the batch. A run that cannot be predicted is said to be one.
    """

    def __init__(
        self, engine: nn.Module, question: Mapping[str, Any], meter: Meter, tell: Callable[[str], None]
    ) -> None:
        self._question, self._meter, self._tell = dict(question), meter, tell
        self._floor = self._before = self._held = 0
        self._child: subprocess.Popen[str] | None = None
        self._measured: dict[str, int] | None = None
        self._hooks = [
            engine.register_forward_pre_hook(self._enter, with_kwargs=True),
            engine.register_forward_hook(self._leave),
        ]

    @property
    def done(self) -> bool:
        """Whether there is nothing more to come."""
        return not self._hooks and self._child is None

    def close(self) -> None:
        """Ends what is under way, without a word."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _enter(self, engine: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if not (engine.training and torch.is_grad_enabled()):
            return
        if self._child is None:
            self._floor = self._meter.peak()
            shape = _batch_shape(args, kwargs)
            if shape is None:
                self._give_up("its batches have no input_ids of [batch, tokens]")
                return
            self._child = _ask({**self._question, "batch": shape[0], "seq": shape[1]})
        self._before = self._meter.allocated()

    def _leave(self, engine: nn.Module, args: Any, output: Any) -> None:
        if engine.training and torch.is_grad_enabled():
            self._held = self._meter.allocated() - self._before

    def _give_up(self, why: str) -> None:
        self.close()
        self._tell(f"memory is not compared with a plan: {why}")

    def after_step(self, step: int) -> None:
        """After the optimizer's step number `step`, from 1."""
        if self.done:
            return
        if step >= 2 and self._child is None:
            self._give_up("no forward went through the engine's own call")
            return
        if step >= 2 and self._measured is None:
            self._measured = {"held": self._held, "peak": self._meter.peak()}
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
        if self._measured is None or self._child is None or self._child.poll() is None:
            return
        out, errors = self._child.communicate()
        self._child = None
        line = next((x for x in out.splitlines() if x.startswith(ANSWER)), None)
        if line is None:
            self._tell(f"memory is not compared with a plan: {(errors.strip().splitlines() or ['no answer'])[-1]}")
            return
        self._compare(json.loads(line.removeprefix(ANSWER)))

    def _compare(self, answer: Mapping[str, Any]) -> None:
        if "refused" in answer:
            self._tell(f"memory is not compared with a plan: {answer['refused']}")
            return
        assert self._measured is not None, "compared after it was measured"
        measured, parts, far = dict(self._measured), [], False
        if self._question["ds_config"].get("zero_optimization", {}).get("stage") == 3:
            del measured["held"]  # weights that ZeRO-3 gathered are among what a forward leaves
        if measured["peak"] <= self._floor:
            parts.append(f"peak below the {self._floor / GIB:.2f} GiB that were reached before the first step")
            del measured["peak"]
        for name, actual in measured.items():
            predicted = int(answer[name])
            parts.append(
                f"{name} {actual / GIB:.2f} GiB, planned {predicted / GIB:.2f} ({actual / max(1, predicted) - 1:+.1%})"
            )
            far = far or abs(actual - predicted) > max(FEW, TOLERANCE * predicted)
        text = f"memory of the second step: {'; '.join(parts)}"
        self._tell(text)
        if far:
            logging.getLogger("ds_seqpar").warning(
                "ds_seqpar: %s: more than %.0f %% apart. What a plan leaves out: padding masks, packed rows, activations that hooks or a "
                "loss of your own keep, other models on this GPU", text, 100 * TOLERANCE,
            )  # fmt: skip


def _batch_shape(args: Any, kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    given = kwargs.get("input_ids", args[0] if args else None)
    if isinstance(given, Tensor) and given.dim() == 2:
        return int(given.shape[0]), int(given.shape[1])
    return None


def _ask(question: Mapping[str, Any]) -> subprocess.Popen[str]:
    """Starts the process that predicts; it inherits neither ranks nor GPUs."""
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    root = str(Path(__file__).parents[2])
    environment |= {
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(x for x in (root, os.environ.get("PYTHONPATH")) if x),
    }
    ask = f"import sys; from {__name__} import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", ask, json.dumps(question)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def predict_memory(question: Mapping[str, Any]) -> dict[str, int]:
    """Bytes that are held after a forward and the allocator's peak in a step, on the first rank.

    `question`: "config" (a model's, as JSON), "attention", "dtype", "key", "ds_config", "dp_size", "batch", "seq", "on_gpu".
    Raises SeqParError where it cannot be predicted.
    """
    from ..hf import planned_config
    from .memory import Zero, estimate
    from .step import trace_step

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(question["config"])
        config = planned_config(str(path))
    config._attn_implementation = question["attention"]
    trace = trace_step(
        config,
        SeqParConfig.from_json(question["key"]),
        batch=question["batch"],
        seq=question["seq"],
        dtype=getattr(torch, question["dtype"]),
        on_gpu=question["on_gpu"],
    )
    zero = replace(Zero.from_json(question["ds_config"]), masters=question["dtype"] != "float32")
    memory = estimate(trace, zero, question["dp_size"])
    return {"held": memory.held_bytes, "peak": max(memory.peak, memory.peak_step)}


def question_of(
    model: Any, config: SeqParConfig, ds_config: Mapping[str, Any], dp_size: int, on_gpu: bool
) -> dict[str, Any]:
    """Of a sharded Hugging Face model."""
    key = {name: value for name, value in asdict(config).items() if value or name not in ("plan", "verify")}
    return {
        "config": model.config.to_json_string(use_diff=False),
        "attention": model.config._attn_implementation,
        "dtype": str(model.dtype).removeprefix("torch."),
        "key": key,
        "ds_config": {name: ds_config[name] for name in _DECIDE if name in ds_config},
        "dp_size": dp_size,
        "on_gpu": on_gpu,
    }


_DECIDE = (
    "zero_optimization",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "bfloat16",
    "fp16",
    "data_types",
    "managed_gradient_accumulation",
)


def main(argv: list[str]) -> int:
    """Answers one question on standard output."""
    try:
        answer: dict[str, Any] = predict_memory(json.loads(argv[0]))
    except SeqParError as problem:
        answer = {"refused": " ".join(str(problem).split())}
    print(ANSWER + json.dumps(answer))
    return 0
