"""The examples by their own launchers on a tiny checkpoint, and every JSON file in configs/hf by the Trainer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers.trainer  # before the ranks are forked
from models import tiny
from ranks import run_ranks
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent / "scripts"))

import hf_trainer

assert transformers.trainer
ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = sorted((ROOT / "configs" / "hf").glob("*.json"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", num_attention_heads=8, num_key_value_heads=4, vocab_size=101).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w3", eos_token="w2", pad_token="w0")
    tokens.save_pretrained(folder)
    return str(folder)


def _launch(folder: Path, *command: str, cwd: Path | None = None) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "integrations"), os.environ.get("PYTHONPATH", "")]),
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *(part.replace("PORT", port) for part in command)], cwd=cwd or folder, env=environment,
        capture_output=True, text=True, timeout=250, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout + done.stderr


DEEPSPEED = ("deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "PORT")


@pytest.mark.slow
def test_the_trainer_example_trains_evaluates_and_saves(model: str, tmp_path: Path) -> None:
    output = _launch(
        tmp_path, *DEEPSPEED, str(ROOT / "examples" / "trainer.py"), "--model", model, "--output_dir", "out", "--deepspeed",
        str(ROOT / "configs" / "hf" / "zero1_tp2.json"), "--seq_len", "16", "--rows", "8", "--max_steps", "2", "--use_cpu", "True",
        "--report_to", "none", "--save_strategy", "no", "--per_device_train_batch_size", "2", "--logging_steps", "1",
    )  # fmt: skip
    assert output.count("tp_size=2") == 1 and "'eval_loss'" in output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0


@pytest.mark.slow
def test_the_lora_example_writes_an_ordinary_adapter(model: str, tmp_path: Path) -> None:
    from peft import PeftModel

    output = _launch(
        tmp_path, *DEEPSPEED, str(ROOT / "examples" / "lora.py"), "--model", model, "--out", "adapter", "--steps", "3",
        "--seq-len", "16", "--rank", "2", "--deepspeed-config", str(ROOT / "configs" / "cpu_tp2.json"),
    )  # fmt: skip
    assert "step 3: loss" in output
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
    trained = [p for name, p in loaded.named_parameters() if "lora_B" in name]
    assert trained and all(float(p.detach().abs().sum()) > 0 for p in trained)


@pytest.mark.slow
def test_the_accelerate_example_trains_and_saves(model: str, tmp_path: Path) -> None:
    """By its yaml file, as a user would start it from the folder of this repository."""
    output = _launch(
        tmp_path, "accelerate.commands.launch", "--config_file", "configs/accelerate_tp2.yaml", "--main_process_port", "PORT",
        "examples/accelerate_loop.py", "--model", model, "--out", str(tmp_path / "out"), "--rows", "4", "--seq-len", "16", cwd=ROOT,
    )  # fmt: skip
    assert "micro batch 4: loss" in output and output.count("tp_size=2") == 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "lora"])
def test_the_sft_example_trains_packed_rows_and_saves(model: str, tmp_path: Path, rank: int) -> None:
    output = _launch(
        tmp_path, *DEEPSPEED, str(ROOT / "examples" / "sft.py"), "--model", model, "--output_dir", "out", "--deepspeed",
        str(ROOT / "configs" / "hf" / "zero1_tp2.json"), "--max_length", "16", "--packing", "True", "--rows", "8", "--max_steps", "2",
        "--use_cpu", "True", "--bf16", "False", "--report_to", "none", "--save_strategy", "no", "--per_device_train_batch_size", "2",
        "--logging_steps", "1", "--lora_rank", str(rank), "--gradient_checkpointing", "False",
    )  # fmt: skip
    assert output.count("tp_size=2") == 1 and "train_loss" in output
    saved = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("adapter_model.safetensors" in saved) == bool(rank) and ("model.safetensors" in saved) == (not rank)


def _one_step(job: dict[str, Any], out: str) -> dict[str, Any]:
    return hf_trainer.run(job, Path(out))


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=pytest.mark.slow if "tp8" in p.stem else (), id=p.stem) for p in CONFIGS]
)
def test_every_hf_config_trains(model: str, tmp_path: Path, path: Path) -> None:
    config = json.loads(path.read_text())
    arguments: dict[str, Any] = dict(
        deepspeed=str(path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        save_strategy="no",
        bf16=True,
    )
    job = {"model": model, "arguments": arguments, "predict": False, "save": False}
    if "lora" in path.stem:
        job["lora"] = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    for ours in run_ranks(config["ds_seqpar"]["tp_size"], _one_step, job, str(tmp_path), timeout=120):
        assert ours["state"]["steps"] == 1 and 3.0 < ours["log"][0]["loss"] < 7.0 and ours["log"][0]["grad_norm"] > 0


def test_there_are_hf_configs() -> None:
    assert len(CONFIGS) >= 6
