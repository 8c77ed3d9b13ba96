"""A user's own training script: Hugging Face, DeepSpeed, a JSON file, and nothing else. Writes one JSON file a rank."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import deepspeed
import deepspeed.comm
import torch
from transformers import LlamaConfig, LlamaForCausalLM

# DeepSpeed would compile an optional shared-memory operator here, for a minute.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]

SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = deepspeed.add_config_arguments(parser).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, _, _, _ = deepspeed.initialize(args=args, model=model, optimizer=optimizer)
    losses = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        ids = torch.randint(1, 61, (1, 9), generator=generator)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    digest = hashlib.sha256()
    for parameter in engine.module.parameters():
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    result = {
        "argv": sys.argv,
        "losses": losses,
        "elements": sum(p.numel() for p in engine.module.parameters()),
        "digest": digest.hexdigest(),
        "random": torch.rand(2).tolist(),
        "batch": engine.train_batch_size(),
        "helpers": sorted(name for name in sys.modules if name.partition(".")[0].startswith("ds_")),
        "hosts": [name for name in ("transformers.trainer", "trl", "peft", "datasets") if name in sys.modules],
        "name": __name__,
    }
    (args.out / f"rank{deepspeed.comm.get_rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
