"""A user's own TRL script: a trainer of TRL with a DeepSpeed JSON, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.utils import logging
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

TRAINERS: dict[str, tuple[Any, Any]] = {
    "sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer), "grpo": (GRPOConfig, GRPOTrainer),
    "rloo": (RLOOConfig, RLOOTrainer), "kto": (KTOConfig, KTOTrainer), "distillation": (DistillationConfig, DistillationTrainer),
}  # fmt: skip

WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(98))]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def _text(start: int, count: int) -> str:
    return " ".join(f"w{(start * 7 + i * 5) % 98}" for i in range(count))


def rows(kind: str, count: int) -> Dataset:
    if kind == "text":
        return Dataset.from_list([{"text": _text(i, 4 + i % 5)} for i in range(count)])
    if kind == "prompt":
        return Dataset.from_list([{"prompt": _text(i, 3 + i % 2)} for i in range(count)])
    if kind == "judged":
        return Dataset.from_list(
            [
                {"prompt": _text(i, 3) + " ", "completion": _text(i + 1, 3 + i % 3), "label": i % 3 > 0}
                for i in range(count)
            ]
        )
    if kind == "completion":
        return Dataset.from_list(
            [{"prompt": _text(i, 3 + i % 2) + " ", "completion": _text(i + 3, 2 + i % 4)} for i in range(count)]
        )
    return Dataset.from_list(
        [
            {"prompt": _text(i, 3) + " ", "chosen": _text(i + 1, 3 + i % 2), "rejected": _text(i + 2, 4)}
            for i in range(count)
        ]
    )


def reward(prompts: list[str], completions: list[str], **more: Any) -> list[float]:
    """Something that differs between the completions of a prompt."""
    return [
        sum((ord(c) * (i + 1)) % 13 for i, c in enumerate(text)) % 17 / 5 + len(prompt) / 10
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def run(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Trains as `job` says: {"model": folder, "trainer": name, "data": kind, "arguments": {...}, "lora": {...}}."""
    logging.set_verbosity_error()
    kind, trainer_class = TRAINERS[job["trainer"]]
    arguments = kind(
        output_dir=str(out / "trainer"), use_cpu=True, bf16=False, report_to=[], logging_steps=1, disable_tqdm=True, seed=7,
        save_strategy="no", gradient_checkpointing=job.get("checkpointing", False), **job["arguments"],
    )  # fmt: skip
    set_seed(7)
    model = AutoModelForCausalLM.from_pretrained(job["model"])
    more: dict[str, Any] = {}
    if job.get("lora"):
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(**job["lora"])
    elif job["trainer"] in ("dpo", "kto") and job.get("reference", True):
        more["ref_model"] = AutoModelForCausalLM.from_pretrained(job["model"])
    if job["trainer"] == "distillation":
        more["teacher_model"] = AutoModelForCausalLM.from_pretrained(job["model"])
    if job["trainer"] in ("grpo", "rloo"):
        more["reward_funcs"] = reward
    if job.get("evaluate"):
        more["eval_dataset"] = rows(job["data"], 5)
    train = rows(job["data"], job.get("rows", 8)) if "disk" not in job else load_from_disk(job["disk"])
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=train, processing_class=tokenizer(), **more
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(out / "saved"))
    drop = ("second", "runtime", "step_time")
    log = [{k: v for k, v in entry.items() if not any(x in k for x in drop)} for entry in trainer.state.log_history]
    report = getattr(trainer.model_wrapped, "seqpar_report", None)
    texts = {name: list(getattr(trainer, "_logs", {}).get(name, ())) for name in ("prompt", "completion", "advantages")}
    return {"log": log, "texts": texts, "gathered": dict(report.materialised) if report is not None else {}}
