"""Fine-tune LoRA adapters with PEFT and a plain DeepSpeed loop; the `ds_seqpar` key shards base model and adapters.

    deepspeed --num_gpus 2 examples/lora.py --model FOLDER --deepspeed-config configs/zero1_tp2.json --out FOLDER

Writes an ordinary PEFT adapter: `PeftModel.from_pretrained(model, FOLDER)` loads it anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
from peft import LoraConfig, get_peft_model
from text_data import pack, standard_library
from transformers import AutoModelForCausalLM, AutoTokenizer

import ds_seqpar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="local Hugging Face checkpoint folder")
    parser.add_argument("--deepspeed-config", type=Path, required=True, metavar="JSON")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8, help="width of the adapters (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()

    config = json.loads(args.deepspeed_config.read_text())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled on the CPU, and never used
    deepspeed.init_distributed()
    torch.manual_seed(0)  # adapters start from random numbers, the same on every rank
    bf16 = config.get("bf16", {}).get("enabled", False)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if bf16 else torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    tp_size = engine.seqpar_report.tp_size
    rank, groups = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) // tp_size
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = pack(standard_library(), tokenizer, args.seq_len, args.steps * groups, seed=0)
    for step in range(args.steps):
        batch = rows[(step * groups + rank // tp_size) % len(rows)][None].to(engine.device)
        loss = engine(input_ids=batch, labels=batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        if rank == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    ds_seqpar.save_pretrained(engine, args.out, tokenizer=tokenizer)


if __name__ == "__main__":
    main()
