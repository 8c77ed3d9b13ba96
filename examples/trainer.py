"""Fine-tune with the Hugging Face Trainer; the `ds_seqpar` key of the DeepSpeed JSON decides how the model is sharded.

    deepspeed --num_gpus 2 examples/trainer.py --model FOLDER --deepspeed configs/hf/zero1_tp2.json --output_dir FOLDER

Takes every option of TrainingArguments. An ordinary Trainer script: the import of ds_seqpar is all that it has more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed.ops
import torch
from text_data import pack, read_documents, split_documents, standard_library
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed

import ds_seqpar  # noqa: F401


@dataclass
class DataArguments:
    model: str = field(metadata={"help": "local Hugging Face checkpoint folder"})
    text: list[str] | None = field(default=None, metadata={"help": "files or folders; default: Python's own source"})
    seq_len: int = field(default=512, metadata={"help": "tokens in a row"})
    rows: int = field(default=256, metadata={"help": "rows to train on"})


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Packed rows of token ids; every token is a label."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def main() -> None:
    parser = HfArgumentParser((DataArguments, TrainingArguments))
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled on the CPU, and never used
    data, training = parser.parse_args_into_dataclasses()
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(data.model)
    documents = read_documents([Path(p) for p in data.text], "text") if data.text else standard_library()
    split: list[Any] = list(split_documents(documents))
    train, held_out = (
        Rows(pack(part, tokenizer, data.seq_len, rows, training.seed))
        for part, rows in zip(split, (data.rows, 8), strict=True)
    )
    model = AutoModelForCausalLM.from_pretrained(data.model, dtype=torch.bfloat16 if training.bf16 else torch.float32)
    trainer = Trainer(model, training, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer)
    trainer.train()
    metrics = trainer.evaluate()  # on all ranks, as training and saving
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(metrics, flush=True)


if __name__ == "__main__":
    main()
