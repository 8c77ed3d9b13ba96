"""Every file in configs/ is a DeepSpeed JSON that trains: one step of a tiny model on as many ranks as it asks for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from exactness import fresh_groups
from models import batches, tiny
from ranks import run_ranks

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.json"))


def _one_step(path: str) -> tuple[int, int, float]:
    fresh_groups()
    config: dict[str, Any] = json.loads(Path(path).read_text())
    model = tiny("llama", num_attention_heads=8, num_key_value_heads=4, vocab_size=128).train()
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), config=path)[0]
    norm = None
    for batch in batches(engine.gradient_accumulation_steps(), engine.train_micro_batch_size_per_gpu()):
        loss = engine(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        engine.backward(loss)
        engine.step()
        norm = engine.get_global_grad_norm()
    assert config["ds_seqpar"]["tp_size"] == engine.seqpar_report.tp_size
    assert norm is None or float(norm) > 0
    return engine.global_steps, engine.zero_optimization_stage(), float(loss.detach())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_trains(path: Path) -> None:
    config = json.loads(path.read_text())
    for steps, stage, loss in run_ranks(config["ds_seqpar"]["tp_size"], _one_step, str(path)):
        assert steps == 1
        assert stage == config["zero_optimization"]["stage"]
        assert 3.0 < loss < 7.0


MIGRATION = (Path(__file__).parent.parent / "docs" / "migration.md").read_text()
DIFFS = re.findall(r"^## (From [^\n]*)\n\n```diff\n(.*?)```", MIGRATION, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("diff", [pytest.param(diff, id=title) for title, diff in DIFFS])
def test_what_the_migration_page_writes_trains(tmp_path: Path, diff: str) -> None:
    """The JSON after each change, in a file that holds nothing else but a micro batch."""
    sides = {
        sign: json.loads("{" + ",".join(x[1:].strip().rstrip(",") for x in diff.splitlines() if x[0] == sign) + "}")
        for sign in "-+"
    }
    assert sides["-"] and "ds_seqpar" not in sides["-"]
    path = tmp_path / "after.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, **sides["+"]}))
    for steps, _, loss in run_ranks(sides["+"]["ds_seqpar"]["tp_size"], _one_step, str(path)):
        assert steps == 1 and 3.0 < loss < 7.0


def test_every_way_of_the_migration_page_is_one_diff() -> None:
    assert len(DIFFS) == MIGRATION.count("\n## From ") == MIGRATION.count("```diff") == 3


def test_there_are_config_files() -> None:
    assert len(CONFIGS) >= 4
