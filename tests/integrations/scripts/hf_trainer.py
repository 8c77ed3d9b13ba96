"""A user's own HF Trainer script: it knows TrainingArguments and a DeepSpeed JSON, nothing else. Writes one JSON file a rank."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

VOCABULARY = 101


class Rows(torch.utils.data.Dataset):
    """Rows of random length; row i is the same in every process."""

    def __init__(self, count: int, longest: int) -> None:
        generator = torch.Generator().manual_seed(count)
        lengths = torch.randint(4, longest + 1, (count,), generator=generator).tolist()
        self.rows = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.rows[index], "length": len(self.rows[index])}


class Stream(torch.utils.data.IterableDataset):
    """The same rows as a stream without a length."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        for i in range(len(self.rows)):
            yield self.rows[i]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=0)
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def collate_at_random(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Some tokens are masked, as in masked language modelling; the choice draws from every generator that collators draw from."""
    batch = collate(rows)
    ids = batch["input_ids"]
    masked = torch.rand(ids.shape) < 0.2
    masked |= torch.from_numpy(np.random.rand(*ids.shape)) < 0.2
    masked |= torch.tensor([[random.random() for _ in row] for row in ids]) < 0.2
    return {**batch, "input_ids": ids.masked_fill(masked & (ids != 0), 1)}


class Watch(TrainerCallback):
    """Keeps what the Trainer told its callbacks, and a sample generated after every evaluation."""

    def __init__(self, too_large: int | None = None) -> None:
        self.events: list[str] = []
        self.samples: list[list[int]] = []
        self.too_large = too_large

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.train_batch_size == self.too_large:
            raise RuntimeError("CUDA out of memory.")  # as torch says it

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("train_begin")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(f"step {state.global_step}")

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model = getattr(model, "module", model)
        tokens = model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
        self.samples.append(tokens[0].tolist())


def metrics(prediction: Any) -> dict[str, float]:
    labels = torch.tensor(prediction.label_ids)[:, 1:]
    logits = torch.tensor(prediction.predictions)[:, : labels.shape[1]].double()
    kept = labels != -100
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return {"rows": float(len(labels)), "tokens": float(kept.sum()), "logprob": float(chosen[kept].sum())}


def text_metrics(prediction: Any) -> dict[str, float]:
    tokens = torch.tensor(prediction.predictions)
    return {
        "rows": float(len(tokens)),
        "mixed": float((tokens * torch.arange(1, tokens.numel() + 1).view_as(tokens)).sum()),
    }


def counts(figures: dict[str, float]) -> dict[str, tuple[float, float]]:
    """What was counted to make each "... per second": the samples, steps or tokens, and how much rounding may hide of it."""
    found = {}
    for name, rate in figures.items():
        if "per_second" in name:
            seconds = figures[name.partition("_")[0] + "_runtime"]
            found[name] = rate * seconds, abs(rate) * 0.5e-4 + abs(seconds) * 0.5e-3
    return found


def _without_times(figures: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in figures.items() if not any(x in k for x in ("second", "runtime", "preparation_time"))}


def run(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Trains as `job` says: {"model": folder, "arguments": {...}, "rows": n, "stream": bool, "resume": bool, ...}.

    With "random" the collator masks tokens at random. With "texts" the Trainer is the one that evaluates what the model generates.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    texts = job.get("texts", False)
    arguments = (Seq2SeqTrainingArguments if texts else TrainingArguments)(
        output_dir=str(out / "trainer"), use_cpu=True, logging_steps=1, disable_tqdm=True, seed=7,
        **{"report_to": [], "include_num_input_tokens_seen": "non_padding", **job["arguments"]},
    )  # fmt: skip
    set_seed(7)
    model = AutoModelForCausalLM.from_pretrained(job["model"], attn_implementation=job.get("attention"))
    if job.get("lora"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**job["lora"]))
    rows = Rows(job.get("rows", 11), job.get("longest", 9))
    seen: list[int] = []

    def remembering(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch_of_tensors = collate(batch)
        seen.append(zlib.crc32(batch_of_tensors["input_ids"].numpy().tobytes()))
        return batch_of_tensors

    watch = Watch(job.get("too_large"))
    trainer = (Seq2SeqTrainer if texts else Trainer)(
        model=model, args=arguments, train_dataset=Stream(rows) if job.get("stream") else rows, eval_dataset=Rows(5, 9),
        data_collator=collate_at_random if job.get("random") else remembering,
        compute_metrics=text_metrics if texts else metrics, callbacks=[watch],
        preprocess_logits_for_metrics=(lambda logits, labels: logits.log_softmax(-1)) if job.get("preprocess") else None,
    )  # fmt: skip
    if job.get("random"):  # collators that run in workers remember nothing here
        plain_step = trainer.training_step

        def step(model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
            seen.append(zlib.crc32(inputs["input_ids"].numpy().tobytes()))
            return plain_step(model, inputs, *rest)

        trainer.training_step = step
    result = trainer.train(resume_from_checkpoint=job.get("resume") or None) if job.get("train", True) else None
    if result is None:
        trainer.evaluate()
    trained_on = list(seen)
    report: dict[str, Any] = {"events": watch.events, "samples": watch.samples, "seen": trained_on}
    if job.get("predict", True):
        prediction = trainer.predict(Rows(5, 9))
        report["predictions"] = torch.tensor(prediction.predictions).double().sum(-1).tolist()
        report["predicted_counts"] = counts(prediction.metrics)
        report["metrics"] = _without_times(prediction.metrics)
    if job.get("save", True):
        trainer.save_model(str(out / "saved"))
    report["log"] = [_without_times(entry) for entry in trainer.state.log_history]
    report["counts"] = [counts(entry) for entry in trainer.state.log_history]
    report["state"] = {
        "steps": trainer.state.global_step, "tokens": trainer.state.num_input_tokens_seen, "flos": trainer.state.total_flos,
        "loss": result and result.training_loss, "total_batch": trainer.get_total_train_batch_size(arguments),
        "best": trainer.state.best_model_checkpoint and Path(trainer.state.best_model_checkpoint).name,
    }  # fmt: skip
    report["elements"] = sum(p.numel() for p in trainer.model.parameters())
    return report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # DeepSpeed would compile an optional shared-memory operator here, for a minute.
    import deepspeed.comm  # noqa: F401

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    report = run(json.loads(args.job.read_text()), args.out)
    (args.out / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
