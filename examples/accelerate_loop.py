"""Fine-tune with a plain accelerate loop; the `ds_seqpar` key of the DeepSpeed JSON decides how the model is sharded.

    accelerate launch --use_deepspeed --deepspeed_config_file configs/hf/zero1_tp2.json --num_processes 2 \\
        examples/accelerate_loop.py --model FOLDER --out FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

import deepspeed.ops
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from text_data import pack, standard_library
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import ds_seqpar  # noqa: F401


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="local Hugging Face checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained checkpoint")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1, help="rows of a micro batch (%(default)s)")
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args()

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled on the CPU, and never used
    set_seed(0)
    if not torch.cuda.is_available():
        PartialState(cpu=True)
    accelerator = Accelerator(gradient_accumulation_steps=args.accumulation)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = pack(standard_library(), tokenizer, args.seq_len, args.rows, seed=0)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    loader: DataLoader[torch.Tensor] = DataLoader(list(rows), batch_size=args.batch, shuffle=True)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for step, batch in enumerate(loader):
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        mean = accelerator.gather_for_metrics(loss.detach().reshape(1)).mean().item()
        accelerator.print(f"micro batch {step + 1}: loss {mean:.4f}", flush=True)
    weights = accelerator.get_state_dict(model)  # on all ranks
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.out, state_dict=weights)
        tokenizer.save_pretrained(args.out)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
