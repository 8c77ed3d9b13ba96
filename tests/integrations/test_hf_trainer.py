"""An HF Trainer script under the key does what the same script does without it: figures, batches, predictions, files."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers.trainer  # before the ranks are forked

sys.path.insert(0, str(Path(__file__).parent / "scripts"))
sys.path.insert(0, str(Path(__file__).parent))

import hf_trainer
from models import batches, tiny
from ranks import RankError, run_ranks
from same_run import assert_same_files, assert_same_log, deepspeed_json

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS: dict[str, Any] = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, learning_rate=1e-3, adam_epsilon=1e-6,
    max_grad_norm=0.5, eval_strategy="steps", eval_steps=2, save_strategy="no",
    per_device_eval_batch_size=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(folder)
    return str(folder)


def _on_rank(job: dict[str, Any], out: str) -> dict[str, Any]:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # data-loader workers are its children
    return hf_trainer.run(job, Path(out))


def _run(world: int, job: dict[str, Any], out: Path, deepspeed: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    out.mkdir(exist_ok=True)
    arguments = {**job["arguments"], **({} if deepspeed is None else {"deepspeed": deepspeed})}
    job = {**job, "arguments": arguments}
    return run_ranks(world, _on_rank, job, str(out), timeout=120, deepspeed=deepspeed is not None)


def _job(model: str, *, rows: int = 11, **more: Any) -> dict[str, Any]:
    arguments = {**STEPS, **more.pop("arguments", {})}
    return {"model": model, "rows": rows, "arguments": arguments, **more}


def _same(mine: list[dict[str, Any]], theirs: dict[str, Any], *, without: tuple[str, ...] = ()) -> None:
    for ours in mine:
        assert_same_log(ours["log"], theirs["log"], without=without)
        for name in ("events", "samples"):
            assert ours[name] == theirs[name], name
        _same_counts(ours, theirs)
        for name in set(theirs["state"]) - {"loss"}:
            assert ours["state"][name] == theirs["state"][name], name
    assert all(ours["predictions"] == mine[0]["predictions"] for ours in mine)


def _same_counts(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Samples, steps, tokens of every "... per second"; each with what the Trainer's rounding hides of it."""
    predicted = [x["predicted_counts"] for x in (mine, theirs) if "predicted_counts" in x]
    for ours, expected in [*zip(mine["counts"], theirs["counts"], strict=True), *([predicted] if predicted else [])]:
        assert ours.keys() == expected.keys()
        for name, (count, hidden) in expected.items():
            assert abs(ours[name][0] - count) <= 1e-3 * count + hidden + ours[name][1], (
                name,
                ours[name],
                expected[name],
            )


def test_two_ranks_train_evaluate_predict_and_save_as_one_process(model: str, tmp_path: Path) -> None:
    """Shuffled, an odd number of rows, accumulation, clipping, a last batch that is not full."""
    job = _job(model)
    alone = _run(1, job, tmp_path / "alone")[0]
    mine = _run(2, job, tmp_path / "mine", deepspeed_json())
    _same(mine, alone)
    for ours in mine:
        assert ours["seen"] == alone["seen"], "every rank of the group takes the batches of one process"
        assert ours["metrics"].keys() == alone["metrics"].keys() and ours["metrics"]["test_rows"] == 5
        assert ours["elements"] < alone["elements"] * 0.6
    assert_same_files(tmp_path / "mine" / "saved", tmp_path / "alone" / "saved")


def test_four_ranks_with_zero_3_train_as_one_process(model: str, tmp_path: Path) -> None:
    job = _job(model, rows=16, predict=False)
    eval_loss = ("eval_loss", "epoch")  # a mean of batch means: it depends on how the rows are batched
    alone = _run(1, {**job, "arguments": {**job["arguments"], "gradient_accumulation_steps": 4}}, tmp_path / "alone")[0]
    mine = _run(4, job, tmp_path / "mine", deepspeed_json(3))
    for ours in mine:
        assert_same_log(ours["log"], alone["log"], without=eval_loss)
        assert {**ours["state"], "loss": 0} == {**alone["state"], "loss": 0}
        assert (ours["events"], ours["samples"]) == (alone["events"], alone["samples"]), (
            "generated from partitioned weights"
        )
    assert mine[0]["seen"] == mine[1]["seen"] and mine[2]["seen"] == mine[3]["seen"]
    first, second = mine[0]["seen"][:4], mine[2]["seen"][:4]  # an epoch of 16 rows
    assert [x for pair in zip(first, second) for x in pair] == alone["seen"][:8]
    assert_same_files(tmp_path / "mine" / "saved", tmp_path / "alone" / "saved")


def _as_plain_ranks(mine: list[dict[str, Any]], plain: list[dict[str, Any]]) -> None:
    """Four ranks of two groups, and two ranks without the key: each group is one of these, batch by batch."""
    for rank, ours in enumerate(mine):
        theirs = plain[rank // 2]
        assert_same_log(ours["log"], theirs["log"])
        _same_counts(ours, theirs)
        assert {**ours["state"], "loss": 0} == {**theirs["state"], "loss": 0}
        for name in ("seen", "events", "samples"):
            assert ours[name] == theirs[name], name


def test_two_groups_of_two_take_the_batches_of_two_plain_ranks(model: str, tmp_path: Path) -> None:
    """Also what accelerate does for data parallelism stays: odd tails, evaluation over two shares."""
    job = _job(model, rows=13)
    plain = _run(2, job, tmp_path / "plain", deepspeed_json(tp_size=None))
    _as_plain_ranks(_run(4, job, tmp_path / "mine", deepspeed_json()), plain)
    # Without the key DeepSpeed's copies lose the tie, and the head is written a second time.
    assert_same_files(tmp_path / "mine" / "saved", tmp_path / "plain" / "saved", also=("lm_head.weight",))


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_collators_that_draw_random_numbers_draw_alike_in_a_group_and_apart_between_groups(
    model: str, tmp_path: Path, world: int, workers: int
) -> None:
    """In workers and in the main process; the batches are those of the run without the key on as many data-parallel ranks."""
    own = {"dataloader_num_workers": workers, "eval_strategy": "no", "max_steps": 3}
    job = _job(model, rows=16, random=True, predict=False, save=False, arguments=own)
    plain = _run(world // 2, job, tmp_path / "plain", deepspeed_json(tp_size=None) if world > 2 else None)
    mine = _run(world, job, tmp_path / "mine", deepspeed_json())
    for rank, ours in enumerate(mine):
        assert ours["seen"] == plain[rank // 2]["seen"] and len(set(ours["seen"])) == 6
        assert_same_log(ours["log"], plain[rank // 2]["log"])


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_stream_without_a_length_is_read_by_every_rank(model: str, tmp_path: Path, world: int) -> None:
    """Rows of any length, and a tail that does not fill a batch."""
    job = _job(model, rows=13, stream=True)
    if world == 2:
        alone = _run(1, job, tmp_path / "plain")[0]
        mine = _run(2, job, tmp_path / "mine", deepspeed_json())
        _same(mine, alone)
        assert mine[0]["seen"] == mine[1]["seen"] == alone["seen"]
        return
    reading = {**job["arguments"], "accelerator_config": {"dispatch_batches": False}}  # else rank 0 reads for both
    plain = _run(2, {**job, "arguments": reading}, tmp_path / "plain", deepspeed_json(tp_size=None))
    assert plain[0]["seen"] != plain[1]["seen"]
    _as_plain_ranks(_run(4, job, tmp_path / "mine", deepspeed_json()), plain)


OPTIONS: dict[str, dict[str, Any]] = {
    "gradient_checkpointing": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
    "reentrant, smoothed": dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}, label_smoothing_factor=0.1
    ),
    "label_smoothing": dict(label_smoothing_factor=0.1),
    "grouped_by_length": dict(train_sampling_strategy="group_by_length", remove_unused_columns=False),
    "drop_last": dict(dataloader_drop_last=True, average_tokens_across_devices=False),
    "weight_decay": dict(max_grad_norm=0.0, weight_decay=0.1),
    "evaluation": dict(
        eval_accumulation_steps=1, prediction_loss_only=False, per_device_eval_batch_size=3,
        include_num_input_tokens_seen="all",
    ),
}  # fmt: skip
QUICK = {("gradient_checkpointing", 2), ("reentrant, smoothed", 2)}


@pytest.mark.parametrize(
    ("option", "world"),
    [
        pytest.param(option, world, marks=() if (option, world) in QUICK else pytest.mark.slow)
        for world in (2, 4)
        for option in OPTIONS
    ],
)
def test_an_option_of_the_trainer_gives_the_same_run(model: str, tmp_path: Path, option: str, world: int) -> None:
    job = _job(model, arguments=OPTIONS[option], preprocess=option == "evaluation")
    if world == 4:
        plain = _run(2, job, tmp_path / "plain", deepspeed_json(2, tp_size=None))
        _as_plain_ranks(_run(4, job, tmp_path / "mine", deepspeed_json(2)), plain)
        assert_same_files(tmp_path / "mine" / "saved", tmp_path / "plain" / "saved", also=("lm_head.weight",))
        return
    alone = _run(1, job, tmp_path / "plain")[0]
    mine = _run(2, job, tmp_path / "mine", deepspeed_json(2))
    _same(mine, alone)
    assert mine[0]["seen"] == mine[1]["seen"] == alone["seen"]
    assert_same_files(tmp_path / "mine" / "saved", tmp_path / "plain" / "saved")


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_the_model_generates_is_evaluated_as_on_plain_ranks(model: str, tmp_path: Path, world: int) -> None:
    """`predict_with_generate`, whose Trainer gathers rows in another way than the plain one."""
    generating = dict(predict_with_generate=True, generation_max_length=14, generation_num_beams=1, max_steps=2)
    job = _job(model, texts=True, arguments=generating)
    deepspeed = deepspeed_json(tp_size=None) if world > 2 else None
    plain = _run(world // 2, job, tmp_path / "plain", deepspeed)
    mine = _run(world, job, tmp_path / "mine", deepspeed_json())
    for rank, ours in enumerate(mine):
        theirs = plain[rank // 2]
        assert_same_log(ours["log"], theirs["log"])
        assert ours["predictions"] == theirs["predictions"]
        assert "eval_mixed" in ours["log"][-2] and ours["metrics"]["test_rows"] == theirs["metrics"]["test_rows"]


def test_tensorboard_gets_what_one_process_writes(model: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = _job(model, rows=8, predict=False, save=False, arguments=dict(report_to=["tensorboard"], max_steps=2))
    alone = _run(1, job, tmp_path / "alone")[0]
    _run(2, job, tmp_path / "mine", deepspeed_json())
    written = {}
    for name in ("alone", "mine"):
        (folder,) = {path.parent for path in (tmp_path / name).rglob("events.out.tfevents.*")}
        assert len(list(folder.glob("events.out.tfevents.*"))) == 1, "one rank writes"
        events = EventAccumulator(str(folder)).Reload()
        tags = [tag for tag in events.Tags()["scalars"] if "second" not in tag and "runtime" not in tag]
        written[name] = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
    assert {"train/loss", "train/grad_norm", "eval/loss", "train/num_input_tokens_seen"} <= set(written["alone"])
    assert written["mine"].keys() == written["alone"].keys() and len(alone["log"]) > 3
    for tag, values in written["alone"].items():
        for ours, expected in zip(written["mine"][tag], values, strict=True):
            assert ours == pytest.approx(expected, rel=1e-5), tag


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_give_the_same_run(model: str, tmp_path: Path, attention: str) -> None:
    job = _job(model, attention=attention)
    alone = _run(1, job, tmp_path / "alone")[0]
    _same(_run(2, job, tmp_path / "mine", deepspeed_json()), alone)


def _compiled(model: str, out: str) -> None:
    arguments = {**STEPS, "deepspeed": deepspeed_json(), "torch_compile": True, "torch_compile_backend": "eager"}
    hf_trainer.run({"model": model, "arguments": arguments}, Path(out))


def test_torch_compile_is_refused_by_name(model: str, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"torch_compile .* cannot follow the sharded layers"):
        run_ranks(2, _compiled, model, str(tmp_path), timeout=60)


@pytest.mark.slow
def test_a_trainer_that_does_not_train_evaluates_and_predicts(model: str, tmp_path: Path) -> None:
    """transformers allows it at ZeRO 3 alone."""
    job = _job(model, train=False)
    alone = _run(1, job, tmp_path / "alone")[0]
    assert alone["samples"] and alone["log"]
    _same(_run(2, job, tmp_path / "mine", deepspeed_json(3)), alone)
    assert_same_files(tmp_path / "mine" / "saved", tmp_path / "alone" / "saved")


@pytest.mark.slow
def test_a_batch_size_is_found_as_on_one_process(model: str, tmp_path: Path) -> None:
    """`auto_find_batch_size` makes another engine over the sharded model for every size."""
    arguments = dict(auto_find_batch_size=True, per_device_train_batch_size=4, max_steps=2)
    job = _job(model, rows=16, too_large=4, arguments=arguments)
    alone = _run(1, job, tmp_path / "alone")[0]
    mine = _run(2, job, tmp_path / "mine", deepspeed_json())
    _same(mine, alone)
    assert mine[0]["seen"] == alone["seen"]
    assert_same_files(tmp_path / "mine" / "saved", tmp_path / "alone" / "saved")


def _noise(adapted: bool) -> list[float]:
    """NEFTune's noise on an embedding, as activate_neftune puts it there: its largest value, and the sum of all of it."""
    import torch
    from exactness import fresh_groups
    from transformers.integrations import neftune

    import ds_seqpar

    fresh_groups()
    transformers.TrainingArguments(use_cpu=True, deepspeed=deepspeed_json(), neftune_noise_alpha=5.0)
    model, seen = tiny("llama").train(), []
    if adapted:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules=["embed_tokens", "q_proj"])).train()
    ds_seqpar.shard(model, {"tp_size": 2})
    embedding = model.get_input_embeddings()
    for hook in (1, 0, 1):
        keep = embedding.register_forward_hook(lambda module, ids, output: seen.append(output.detach().clone()))
        if not hook:
            keep.remove()
            neftune.activate_neftune(model, 5.0)
    torch.manual_seed(3)
    model(**batches(1, 4)[0]).loss.backward()
    noise = seen[1] - seen[0]
    return [float(noise.abs().max()), float(noise.sum())]


@pytest.mark.parametrize("adapted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_neftunes_noise_has_the_size_that_it_has_on_one_process(adapted: bool) -> None:
    largest = 5.0 / (7 * 48) ** 0.5  # alpha / sqrt(s * h)
    first, second = run_ranks(2, _noise, adapted, timeout=60)
    assert first[1] != second[1], "every rank draws for its own rows"
    for found, _ in (first, second):
        assert 0.98 * largest < found <= 1.0001 * largest


@pytest.mark.parametrize(("world", "stage"), [(2, 1), pytest.param(4, 3, marks=pytest.mark.slow)])
def test_checkpoints_resume_and_the_best_one_is_loaded(model: str, tmp_path: Path, world: int, stage: int) -> None:
    saving: dict[str, Any] = dict(
        save_strategy="steps", save_steps=2, save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="logprob",
        greater_is_better=True, learning_rate=1e-2, gradient_accumulation_steps=4 // world,
    )  # fmt: skip
    job = _job(model, arguments=saving, rows=8 * world // 2 if world > 2 else 11)
    one = {**job, "arguments": {**job["arguments"], "gradient_accumulation_steps": 2}}
    alone = _run(1, one, tmp_path / "alone")[0]
    mine = _run(world, job, tmp_path / "mine", deepspeed_json(stage))
    eval_loss = ("eval_loss",) if world > 2 else ()  # a mean of batch means: it depends on how the rows are batched
    for ours in mine:
        assert_same_log(ours["log"], alone["log"], without=eval_loss)
        assert {**ours["state"], "loss": 0} == {**alone["state"], "loss": 0}
    if world == 2:
        _same(mine, alone)
    assert_same_files(tmp_path / "mine" / "saved", tmp_path / "alone" / "saved")
    best = alone["state"]["best"]
    kept = {path.name for path in (tmp_path / "alone" / "trainer").iterdir()}
    assert {path.name for path in (tmp_path / "mine" / "trainer").iterdir()} == kept and best in kept
    (tmp_path / "resumed").mkdir()
    first = {**job["arguments"], "max_steps": 4, "load_best_model_at_end": False, "save_total_limit": None}
    whole = _run(world, {**job, "arguments": first}, tmp_path / "resumed", deepspeed_json(stage))
    shutil.rmtree(tmp_path / "resumed" / "trainer" / "checkpoint-4")
    again = _run(world, {**job, "arguments": first, "resume": True}, tmp_path / "resumed", deepspeed_json(stage))
    for ours, theirs in zip(again, whole, strict=True):
        assert_same_log(ours["log"], theirs["log"], without=("train_loss",))
        assert ours["events"] == ["train_begin", "step 3", "step 4"]
        assert ours["state"]["tokens"] == theirs["state"]["tokens"] and ours["state"]["flos"] == theirs["state"]["flos"]


def _batch_sizes(model: str, out: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, TrainingArguments

    import ds_seqpar

    def trainer(**config: Any) -> Any:
        arguments = TrainingArguments(
            output_dir=out, use_cpu=True, report_to=[], deepspeed={**deepspeed_json(), **config}, max_steps=1, disable_tqdm=True,
            per_device_train_batch_size=2, gradient_accumulation_steps=3, save_strategy="no",
        )  # fmt: skip
        return transformers.Trainer(
            AutoModelForCausalLM.from_pretrained(model), arguments, train_dataset=hf_trainer.Rows(24, 5),
            data_collator=hf_trainer.collate,
        )  # fmt: skip

    right = trainer(train_batch_size=2 * 3 * 2)
    right.train()
    assert right.deepspeed.train_batch_size() == 12 == right.get_total_train_batch_size(right.args)
    assert right.get_tp_size() == 2
    with pytest.raises(ValueError, match=r"train_batch_size=24 vs hf train_batch_size \(calculated over data-parallel"):
        trainer(train_batch_size=24).train()
    for wrong, message in (
        (dict(tensor_parallel={"autotp_size": 4}), "contradict each other"),
        (dict(ds_seqpar={"tp_size": 3}), "does not divide the 4 ranks"),
        (dict(ds_seqpar={"tp": 2}), "unknown field"),
    ):
        with pytest.raises(ds_seqpar.ConfigError, match=message):
            trainer(**wrong)
    torch.distributed.barrier()


def test_batch_sizes_are_checked_over_the_data_parallel_ranks(model: str, tmp_path: Path) -> None:
    run_ranks(4, _batch_sizes, model, str(tmp_path), timeout=120)


def _dispatch(model: str, out: str) -> None:
    arguments = {**STEPS, "deepspeed": deepspeed_json(), "accelerator_config": {"dispatch_batches": True}}
    hf_trainer.run({"model": model, "arguments": arguments}, Path(out))


def test_dispatched_batches_are_refused_by_name(model: str, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="dispatch_batches=True hands every rank the same batch"):
        run_ranks(2, _dispatch, model, str(tmp_path), timeout=60)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "PORT"],
    "deepspeed": ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "PORT"],
    "accelerate": [
        "accelerate.commands.launch", "--use_deepspeed", "--deepspeed_config_file", "ds.json", "--num_processes", "2",
        "--main_process_port", "PORT",
    ],
}  # fmt: skip


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("launcher", "module"),
    [
        pytest.param(launcher, module, marks=() if launcher == "torchrun" and not module else pytest.mark.slow)
        for launcher in LAUNCHERS
        for module in (False, True)
    ],
)
def test_a_launcher_starts_the_script_as_a_user_would(model: str, tmp_path: Path, launcher: str, module: bool) -> None:
    """The JSON is a path; the script gets one import, or none at all through ds_seqpar.run."""
    job = _job(model, rows=8, predict=False, arguments=dict(max_steps=2, eval_strategy="no"))
    alone = _run(1, job, tmp_path / "alone")[0]
    (tmp_path / "ds.json").write_text(json.dumps(deepspeed_json()))
    if launcher != "accelerate":
        job["arguments"]["deepspeed"] = "ds.json"
    (tmp_path / "job.json").write_text(json.dumps(job))
    script, text = tmp_path / "train.py", Path(hf_trainer.__file__).read_text()
    assert "seqpar" not in text
    script.write_text(text if module else text.replace("import argparse\n", "import ds_seqpar\nimport argparse\n", 1))
    command = [x.replace("PORT", str(_free_port())) for x in LAUNCHERS[launcher]]
    command += [*(["--module", "ds_seqpar.run"] if module else []), str(script)]
    (tmp_path / "mine").mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'integrations'}", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *command, "--job", "job.json", "--out", "mine"], cwd=tmp_path, env=environment,
        capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    for rank in range(2):
        ours = json.loads((tmp_path / "mine" / f"rank{rank}.json").read_text())
        assert_same_log(ours["log"], alone["log"])
        assert ours["seen"] == alone["seen"] and ours["elements"] < alone["elements"] * 0.6
    assert_same_files(tmp_path / "mine" / "saved", tmp_path / "alone" / "saved")


def _left_out(model: str, out: str) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    hf_trainer.run({"model": model, "arguments": {**STEPS, "deepspeed": deepspeed_json()}}, Path(out))


def test_a_trainer_that_leaves_deepspeed_out_is_told_so(model: str, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="accelerate runs without DeepSpeed"):
        run_ranks(2, _left_out, model, str(tmp_path), timeout=60)
