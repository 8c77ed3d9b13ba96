"""Adapters that make trainers (HF Trainer, accelerate, TRL, PEFT) aware of ds_seqpar: one module for each host.

`import ds_seqpar` calls `install()`. A host that is not installed is left out, and nothing here changes what a host does
for a DeepSpeed config without the `ds_seqpar` key.
"""

from importlib.util import find_spec

__all__ = ["install"]


def install() -> None:
    """Adapts the installed hosts. Idempotent."""
    if find_spec("accelerate") is None:
        return
    from . import accelerate, hf_trainer, trl

    accelerate.install()
    hf_trainer.install()
    trl.install()


import ds_seqpar  # noqa: E402, F401  whichever of the two is imported first, both are whole before an adapter is
