"""Every command of docs/checkpoints.md does what the page says."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "checkpoints.md").read_text()


def _blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def _run(line: str, folder: Path) -> str:
    words = shlex.split(line)
    if words[0] == "deepspeed":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words[:1] = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(port)]
    elif words[0] == "python":
        words[0] = sys.executable
    environment = {n: v for n, v in os.environ.items() if n not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        words, cwd=folder, env={**environment, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=400,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_every_command_of_the_page(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "my-model")
    (tmp_path / "train.py").write_text(_blocks("python")[0])
    for name, text in zip(("tp2.json", "tp1.json"), _blocks("json"), strict=True):
        (tmp_path / name).write_text(text)
    lines = [line for block in _blocks("bash") for line in block.splitlines()]
    outputs = [_run(line, tmp_path) for line in lines]
    for output, steps in zip((outputs[0], outputs[1], outputs[3]), ("0 to 3", "3 to 6", "6 to 9"), strict=True):
        assert f"rank 0: steps {steps}" in output
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").state_dict()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    assert all(torch.equal(x, exported[name]) for name, x in trained.items())
    assert any(not torch.equal(x, trained[name]) for name, x in tiny("llama").state_dict().items())


def test_the_page_names_what_exists() -> None:
    import ds_seqpar

    for name in set(re.findall(r"ds_seqpar\.([a-z_]+)\(", PAGE)):
        assert callable(getattr(ds_seqpar, name)), name
    assert len([line for block in _blocks("bash") for line in block.splitlines()]) == 5
