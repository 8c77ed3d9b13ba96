"""The example under `make finetune`, by the real launcher, on a tiny checkpoint and the user's own text."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from models import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent


def _checkpoint(folder: Path, text: list[str]) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=101, special_tokens=["<unk>", "<s>", "</s>"]))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    tiny("llama").save_pretrained(folder)


def _finetune(*arguments: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port)]
    command += [str(ROOT / "examples" / "finetune.py"), *arguments]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=280,
        stdin=subprocess.DEVNULL,
    )


def test_finetune_trains_saves_and_reloads(tmp_path: Path) -> None:
    lines = [f"the number {i} is followed by the number {i + 1} and by no other" for i in range(400)]
    _checkpoint(tmp_path / "model", lines)
    rows = [json.dumps({"body": " ".join(lines[i : i + 20])}) for i in range(0, 400, 20)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    result = _finetune(
        "--model", str(tmp_path / "model"), "--deepspeed-config", str(ROOT / "configs" / "cpu_tp2.json"),
        "--text", str(tmp_path / "text.jsonl"), "--jsonl-field", "body", "--out", str(tmp_path / "out"), "--steps", "8",
        "--seq-len", "32", "--lr", "1e-2", "--held-out-rows", "2", "--new-tokens", "3", "--prompt", "the number",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed: expected" in result.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["tp_size"] == 2
    assert len(report["steps"]) == 8
    assert report["held_out_loss_after"] < report["held_out_loss_before"]
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "checkpoint" / "model.safetensors").is_file()


def test_finetune_names_what_is_wrong_with_its_input(tmp_path: Path) -> None:
    result = _finetune(
        "--model", str(tmp_path / "nothing"), "--deepspeed-config", str(ROOT / "configs" / "cpu_tp2.json"),
        "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert result.returncode != 0
    assert "nothing" in result.stderr + result.stdout
    assert "Traceback" not in result.stderr
