"""Sharded parameters on their way to and from checkpoints."""
