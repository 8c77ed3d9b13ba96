"""Proof while it runs: a sharded model against the unsharded one before training, replicas against each other during it."""
