"""Mean loss of a saved checkpoint over held-out rows of tokens, with plain transformers and nothing else.

    python examples/evaluate.py --model build/finetune/checkpoint --rows build/finetune/held_out.json --expect 1.2345

With --expect the exit status tells whether the loss is the expected one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--rows", type=Path, required=True, help="JSON file: a list of rows of token ids")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--expect", type=float, help="the loss that must come out")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="how far from --expect it may be (%(default)s)")
    args = parser.parse_args()
    for path in (args.model / "config.json", args.rows):
        if not path.is_file():
            parser.error(f"{path} does not exist")

    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # this process is alone, unlike a rank
    rows = [torch.tensor([row], device=device) for row in json.loads(args.rows.read_text())]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(device).eval()
    with torch.no_grad():
        losses = [model(input_ids=row, labels=row, use_cache=False).loss.item() for row in rows]
    loss = sum(losses) / len(losses)
    print(f"plain transformers, {len(losses)} held-out rows: loss {loss:.6f}", flush=True)
    if args.expect is None:
        return
    if "ds_seqpar" in sys.modules:
        sys.exit("this check must not import ds_seqpar")
    distance = abs(loss - args.expect)
    verdict = f"expected {args.expect:.6f}, which is {distance:.1e} away (tolerance {args.tolerance:g})"
    if not distance <= args.tolerance:
        sys.exit(f"FAILED: {verdict}")
    print(f"passed: {verdict}", flush=True)


if __name__ == "__main__":
    main()
