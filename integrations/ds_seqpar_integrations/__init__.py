"""Adapters that make trainers (HF Trainer, accelerate, TRL, PEFT) aware of ds_seqpar: one module for each trainer."""
