"""An HF Trainer script under the key does what the same script does without it: figures, batches, predictions, files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
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
        for mine_counted, counted in zip(ours["counts"], theirs["counts"], strict=True):
            assert mine_counted == pytest.approx(counted, rel=0.03), "samples, steps, tokens a second; both are rounded"
        assert ours.get("predicted_counts") == pytest.approx(theirs.get("predicted_counts"), rel=0.03)
        for name in set(theirs["state"]) - {"loss"}:
            assert ours["state"][name] == theirs["state"][name], name
    assert all(ours["predictions"] == mine[0]["predictions"] for ours in mine)


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
    assert mine[0]["seen"] == mine[1]["seen"] and mine[2]["seen"] == mine[3]["seen"]
    first, second = mine[0]["seen"][:4], mine[2]["seen"][:4]  # an epoch of 16 rows
    assert [x for pair in zip(first, second) for x in pair] == alone["seen"][:8]
    assert_same_files(tmp_path / "mine" / "saved", tmp_path / "alone" / "saved")


@pytest.mark.parametrize("stream", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["shuffled", "iterable"])
def test_two_groups_of_two_take_the_batches_of_two_plain_ranks(model: str, tmp_path: Path, stream: bool) -> None:
    """Also what accelerate does for data parallelism stays: odd tails, evaluation over two shares, streams."""
    # Without the key accelerate sends batches of a stream from rank 0, which must then be of one size.
    job = _job(model, rows=16 if stream else 13, stream=stream, longest=4 if stream else 9)
    plain = _run(2, job, tmp_path / "plain", deepspeed_json(tp_size=None))
    mine = _run(4, job, tmp_path / "mine", deepspeed_json())
    for rank, ours in enumerate(mine):
        theirs = plain[rank // 2]
        assert_same_log(ours["log"], theirs["log"])
        assert {**ours["state"], "loss": 0} == {**theirs["state"], "loss": 0}
        if not stream:  # without the key accelerate reads a stream on rank 0 and sends the batches
            assert ours["seen"] == theirs["seen"]
    # Without the key DeepSpeed's copies lose the tie, and the head is written a second time.
    assert_same_files(tmp_path / "mine" / "saved", tmp_path / "plain" / "saved", also=("lm_head.weight",))


OPTIONS: dict[str, dict[str, Any]] = {
    "gradient_checkpointing": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
    "reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
    "label_smoothing": dict(label_smoothing_factor=0.1),
    "grouped_by_length": dict(train_sampling_strategy="group_by_length", remove_unused_columns=False),
    "drop_last": dict(dataloader_drop_last=True, average_tokens_across_devices=False),
    "weight_decay": dict(max_grad_norm=0.0, eval_accumulation_steps=1, weight_decay=0.1),
}
QUICK = {"gradient_checkpointing", "reentrant", "label_smoothing"}


@pytest.mark.parametrize("option", [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in OPTIONS])
def test_an_option_of_the_trainer_gives_the_same_run(model: str, tmp_path: Path, option: str) -> None:
    job = _job(model, arguments=OPTIONS[option])
    alone = _run(1, job, tmp_path / "alone")[0]
    mine = _run(2, job, tmp_path / "mine", deepspeed_json(2))
    _same(mine, alone)
    assert_same_files(tmp_path / "mine" / "saved", tmp_path / "alone" / "saved")


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


def _kernels(model: str) -> None:
    """What Liger and `use_kernels` do: forwards on the objects of norms and MLPs, and a loss of their own unless told not to."""
    import torch
    from exactness import fresh_groups
    from sharding import same_loss_and_gradients
    from transformers import TrainingArguments

    import ds_seqpar

    class Swapped:
        @staticmethod
        def norm(self: Any, x: Any) -> Any:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

        @staticmethod
        def mlp(self: Any, x: Any) -> Any:
            return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)) * 2.0

    def swapped(of: Any) -> Any:
        for name, module in of.named_modules():
            kind = Swapped.norm if name.endswith("norm") else Swapped.mlp if name.endswith("mlp") else None
            if kind is not None:
                module.forward = types.MethodType(kind, module)
        return of.train()

    fresh_groups()
    ours, theirs = (swapped(tiny("llama", dtype=torch.float64)) for _ in range(2))
    ds_seqpar.shard(ours, {"tp_size": 2})
    batch = batches(1, 2)[0]
    same_loss_and_gradients(ours, theirs, lambda of: of(**batch).loss)
    with torch.no_grad():
        mine, expected = (of.eval()(**batch).loss for of in (ours, theirs))
        torch.testing.assert_close(mine, expected, check_dtype=False, rtol=1e-6, atol=0)
    arguments = TrainingArguments(
        output_dir="out", use_cpu=True, deepspeed=deepspeed_json(), use_liger_kernel=True, per_device_train_batch_size=2
    )
    assert arguments.liger_kernel_config == {"fused_linear_cross_entropy": False}


def test_kernels_on_module_objects_stay_and_their_loss_is_turned_off(model: str) -> None:
    run_ranks(2, _kernels, model, timeout=60)


def _hub_kernels(model: str) -> None:
    """What `use_kernels` does: forwards on the objects of modules whose class names a kernel, anew with every change of mode."""
    import torch
    from exactness import fresh_groups
    from sharding import same_loss_and_gradients

    import ds_seqpar

    fresh_groups()
    ours, theirs = (tiny("llama", dtype=torch.float64).train() for _ in range(2))
    norms = [m for m in ours.modules() if type(m).__name__ == "LlamaRMSNorm"]
    type(norms[0]).kernel_layer_name = "RMSNorm"
    ours._use_kernels = True
    for norm in norms:
        norm.forward = types.MethodType(lambda self, x: x * 3.0, norm)
    report = ds_seqpar.shard(ours, {"tp_size": 2})
    assert [x for x in report.remarks if x.startswith("use_kernels is turned off for 5 modules")]
    batch = batches(1, 2)[0]
    ours.eval(), ours.train()
    same_loss_and_gradients(ours, theirs, lambda of: of(**batch).loss)
    norms[2].forward = types.MethodType(lambda self, x: x * 3.0, norms[2])
    with pytest.raises(
        ds_seqpar.PlanError, match=r"layers.1.input_layernorm was replaced by .* after the model was sharded"
    ):
        ours(**batch)

    linear = tiny("llama")
    linear.model.layers[0].mlp.up_proj.forward = types.MethodType(lambda self, x: x, linear.model.layers[0].mlp.up_proj)
    liger = tiny("llama")
    liger.forward = types.MethodType(_as_ligers, liger)
    for wrong, message in (
        (linear, "up_proj was replaced on the object"),
        (liger, "Liger replaced the forward of Llama"),
    ):
        shapes = [p.shape for p in wrong.parameters()]
        with pytest.raises(ds_seqpar.PlanError, match=message):
            ds_seqpar.shard(wrong, {"tp_size": 2})
        assert shapes == [p.shape for p in wrong.parameters()]


def _as_ligers(self: Any, input_ids: Any = None) -> None:
    """A stand-in for Liger's fused loss, by the name of its module."""


_as_ligers.__module__ = "liger_kernel.transformers.model.llama"


def test_hub_kernels_are_turned_off_and_replaced_forwards_refused(model: str) -> None:
    run_ranks(2, _hub_kernels, model, timeout=60)


def _attending(seen: list[tuple[int, ...]]) -> Any:
    import torch

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any) -> Any:
        seen.append(tuple(query.shape))
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        causal = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
        weights = (query @ key.transpose(-1, -2) * scaling).masked_fill(~causal, -1e30).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    return attend


def _attention_of_a_user(model: str) -> list[tuple[int, ...]]:
    """Any `attn_implementation` gets whole sequences of this rank's heads; here one that somebody registered."""
    import torch
    from exactness import fresh_groups
    from sharding import same_loss_and_gradients
    from transformers import AttentionInterface

    import ds_seqpar

    seen: list[tuple[int, ...]] = []
    AttentionInterface.register("of_a_user", _attending(seen))
    fresh_groups()
    ours, theirs = (tiny("llama", dtype=torch.float64).train() for _ in range(2))
    for of in (ours, theirs):
        of.set_attn_implementation("of_a_user")
    ds_seqpar.shard(ours, {"tp_size": 2})
    batch = {name: x for name, x in batches(1, 2)[0].items() if name != "attention_mask"}
    same_loss_and_gradients(ours, theirs, lambda of: of(**batch).loss)
    return seen


def test_an_attention_implementation_sees_whole_sequences_of_its_heads(model: str) -> None:
    for seen in run_ranks(2, _attention_of_a_user, model, timeout=60):
        heads = {shape[1] for shape in seen}
        assert {shape[2] for shape in seen} == {7} and heads == {6, seen[0][1]} and seen[0][1] < 6


def test_checkpoints_resume_and_the_best_one_is_loaded(model: str, tmp_path: Path) -> None:
    saving: dict[str, Any] = dict(
        save_strategy="steps", save_steps=2, save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="logprob",
        greater_is_better=True, learning_rate=1e-2,
    )  # fmt: skip
    job = _job(model, arguments=saving)
    alone = _run(1, job, tmp_path / "alone")[0]
    mine = _run(2, job, tmp_path / "mine", deepspeed_json())
    _same(mine, alone)
    assert_same_files(tmp_path / "mine" / "saved", tmp_path / "alone" / "saved")
    best = alone["state"]["best"]
    kept = {path.name for path in (tmp_path / "alone" / "trainer").iterdir()}
    assert {path.name for path in (tmp_path / "mine" / "trainer").iterdir()} == kept and best in kept
    (tmp_path / "resumed").mkdir()
    first = {**job["arguments"], "max_steps": 4, "load_best_model_at_end": False, "save_total_limit": None}
    whole = _run(2, {**job, "arguments": first}, tmp_path / "resumed", deepspeed_json())
    shutil.rmtree(tmp_path / "resumed" / "trainer" / "checkpoint-4")
    again = _run(2, {**job, "arguments": first, "resume": True}, tmp_path / "resumed", deepspeed_json())
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
    "torchrun": (["-m", "torch.distributed.run", "--nproc_per_node", "2"], [], True),
    "deepspeed --module ds_seqpar.run": (
        ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module", "ds_seqpar.run"], [], False,
    ),
    "accelerate launch": (
        ["-m", "accelerate.commands.launch", "--use_deepspeed", "--deepspeed_config_file", "ds.json", "--num_processes", "2"],
        [], True,
    ),
}  # fmt: skip


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    "launcher", [pytest.param(x, marks=() if "run" in x and "torch" in x else pytest.mark.slow) for x in LAUNCHERS]
)
def test_a_launcher_starts_the_script_as_a_user_would(model: str, tmp_path: Path, launcher: str) -> None:
    """The JSON is a path; the script gets one import, or none at all through ds_seqpar.run."""
    command, _, imports = LAUNCHERS[launcher]
    job = _job(model, rows=8, predict=False, arguments=dict(max_steps=2, eval_strategy="no"))
    alone = _run(1, job, tmp_path / "alone")[0]
    assert "seqpar" not in Path(hf_trainer.__file__).read_text()
    (tmp_path / "ds.json").write_text(json.dumps(deepspeed_json()))
    if launcher != "accelerate launch":
        job["arguments"]["deepspeed"] = "ds.json"
    (tmp_path / "job.json").write_text(json.dumps(job))
    script = tmp_path / "train.py"
    text = Path(hf_trainer.__file__).read_text()
    script.write_text(text.replace("import argparse\n", "import ds_seqpar\nimport argparse\n", 1) if imports else text)
    port = ["--main_process_port" if "accelerate" in launcher else "--master_port", str(_free_port())]
    if "module" in launcher:
        command = [*command[:2], *port, *command[2:]]
    else:
        command = [*command, *port]
    (tmp_path / "mine").mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'integrations'}", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command, str(script), "--job", "job.json", "--out", "mine"], cwd=tmp_path, env=environment,
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
