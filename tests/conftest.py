"""Set before torch is imported: ranks are forked, so the parent must have no threads, and DeepSpeed must stay on the CPU."""

import os
import sys
from pathlib import Path

# The same tests run over NCCL where there are GPUs.
if os.environ.setdefault("DS_SEQPAR_TEST_DEVICE", "cpu") == "cuda":
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for GPUs must not start CUDA before the fork
else:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import logging
from typing import Any

import torch

torch.set_num_threads(1)
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
logging.getLogger("ds_seqpar").setLevel(logging.WARNING)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Tests of kernels and of fused optimizers start CUDA in this process, from which no ranks can be forked then: they come last."""
    items.sort(key=lambda item: "kernels" in item.path.parts or item.path.name == "test_optimizers.py")
