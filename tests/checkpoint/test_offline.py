"""`python -m ds_seqpar export`: the checkpoint of any ZeRO stage, tp and dp becomes an ordinary one, or is refused by name."""

from __future__ import annotations

import fcntl
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from training import engine_at, run, weights
from transformers import AutoModelForCausalLM

from ds_seqpar.cli import main


def _train(family: str, tp: int, stage: int, dtype: torch.dtype, frozen: bool, folder: str) -> dict[str, torch.Tensor]:
    from training import tiny

    name = next(n for n, _ in tiny(family).named_parameters() if "q_proj" in n or "query_key_value" in n or "qkv" in n)
    engine = engine_at(family, tp, stage, dtype=dtype, freeze=(name, "norm") if frozen else ())
    run(engine, 0, 1)
    engine.save_checkpoint(folder, tag="before")
    run(engine, 1, 2)
    engine.save_checkpoint(folder)
    return weights(engine)


@pytest.mark.parametrize(
    ("family", "tp", "dp", "stage", "dtype", "frozen"),
    [
        ("llama", 2, 1, 1, torch.float32, False),
        ("phi3", 2, 2, 3, torch.bfloat16, False),
        ("qwen3", 4, 1, 3, torch.float32, True),
        ("gpt_neox", 2, 1, 2, torch.float32, True),
        ("llama", 2, 2, 0, torch.bfloat16, False),
    ],
)
def test_the_tool_writes_what_the_engine_holds(
    tmp_path: Path, family: str, tp: int, dp: int, stage: int, dtype: torch.dtype, frozen: bool
) -> None:
    state = run_ranks(tp * dp, _train, family, tp, stage, dtype, frozen, str(tmp_path / "in"))[0]
    assert main(["export", str(tmp_path / "in"), str(tmp_path / "out"), "--max-shard-size", "30KB"]) == 0
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(x, state[n]) and x.dtype == state[n].dtype == dtype for n, x in loaded.items())


def test_the_command_and_its_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(2, _train, "llama", 2, 1, torch.float32, False, str(tmp_path / "in"))
    command = [
        sys.executable,
        "-m",
        "ds_seqpar",
        "export",
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        "--tag",
        "before",
    ]
    terminal, theirs = pty.openpty()  # a progress bar is for a terminal only
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=120, check=False)
    shown = os.read(terminal, 2**16).decode()
    os.close(terminal), os.close(theirs)
    assert done.returncode == 0 and f"wrote {tmp_path / 'out'}" in done.stdout, shown
    assert "export: 100%" in shown, shown
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    good, model, optimizer = (
        tmp_path / "in" / "global_step2",
        "mp_rank_01_model_states.pt",
        "mp_rank_00_optim_states.pt",
    )
    cases = {
        "missing": (lambda c: (c / model).unlink(), f"{model} is missing"),
        "mixed": (
            lambda c: shutil.copy(good.parent / "before" / model, c / model),
            f"{model} is not the file that was saved",
        ),
        "truncated": (lambda c: (c / model).write_bytes(b"x" * 100), f"{model} is truncated"),
        "swapped": (lambda c: shutil.copy(c / model, c / model.replace("01", "00")), "files of two ranks were swapped"),
        "optimizer": (lambda c: (c / f"zero_pp_rank_0_{optimizer}").unlink(), f"{optimizer} is missing"),
        "no manifest": (lambda c: (c / "ds_seqpar_manifest.json").unlink(), "holds no checkpoint"),
    }
    for name, (damage, message) in cases.items():
        shutil.copytree(good, tmp_path / name)
        damage(tmp_path / name)
        assert main(["export", str(tmp_path / name), str(tmp_path / "refused")]) == 1
        error = capsys.readouterr().err
        assert "error: " in error and message in error, f"{name}: {error}"
    assert main(["export", str(tmp_path / "in"), str(tmp_path / "refused"), "--tag", "third"]) == 1
    assert "'before', 'global_step2'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    for target in (tmp_path / "file", tmp_path / "file" / "x"):
        assert main(["export", str(good), str(target)]) == 1
        assert f"{target} was not written: {tmp_path / 'file'} is a file" in capsys.readouterr().err
    assert (tmp_path / "file").is_file()
    assert not (tmp_path / "refused").exists()


def _train_adapters(folder: str) -> None:
    engine = engine_at("llama", 2, 1, lora=True)
    run(engine, 0, 1)
    engine.save_checkpoint(folder)


def test_adapters_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(2, _train_adapters, str(tmp_path / "in"))
    assert main(["export", str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "holds a PeftModelForCausalLM, whose adapters this tool cannot write" in error and "save_pretrained" in error
    assert not (tmp_path / "out").exists()
