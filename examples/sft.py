"""Fine-tune with TRL's SFTTrainer; the `ds_seqpar` key of its DeepSpeed JSON decides how the model is sharded.

    deepspeed --num_gpus 2 examples/sft.py --model FOLDER --deepspeed configs/hf/zero1_tp2.json --output_dir FOLDER

Takes every option of SFTConfig, such as --packing True. `--lora_rank 8` trains LoRA adapters instead of the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import deepspeed.ops
import torch
from datasets import Dataset
from peft import LoraConfig
from text_data import read_documents, standard_library
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

import ds_seqpar  # noqa: F401


@dataclass
class DataArguments:
    model: str = field(metadata={"help": "local Hugging Face checkpoint folder"})
    text: list[str] | None = field(default=None, metadata={"help": "files or folders; default: Python's own source"})
    rows: int = field(default=256, metadata={"help": "documents to train on, from the start"})
    lora_rank: int = field(default=0, metadata={"help": "width of LoRA adapters; 0 trains the whole model"})


def main() -> None:
    parser = HfArgumentParser((DataArguments, SFTConfig))
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled on the CPU, and never used
    data, training = parser.parse_args_into_dataclasses()
    documents = read_documents([Path(p) for p in data.text], "text") if data.text else standard_library()
    texts = [document.text for document in documents[: data.rows]]
    tokenizer = AutoTokenizer.from_pretrained(data.model)
    model = AutoModelForCausalLM.from_pretrained(data.model, dtype=torch.bfloat16 if training.bf16 else torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", r=data.lora_rank, target_modules="all-linear") if data.lora_rank else None
    trainer = SFTTrainer(
        model, training, train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer, peft_config=lora
    )
    trainer.train()
    trainer.save_model()  # on all ranks, as training
    if trainer.is_world_process_zero():
        print(trainer.state.log_history[-1], flush=True)


if __name__ == "__main__":
    main()
