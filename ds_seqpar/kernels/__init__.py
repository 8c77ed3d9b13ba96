"""Elementwise work in one pass over memory: Triton on GPUs, torch elsewhere; the same functions on both. Imports torch only."""
