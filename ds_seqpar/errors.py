"""What can go wrong, by whose hand: one class for each thing a user can mend."""

__all__ = [
    "CheckpointError", "ConfigError", "DataMismatchError", "PlanError", "RankLostError", "ReplicaMismatchError", "SeqParError",
    "VerificationError",
]  # fmt: skip


class SeqParError(ValueError):
    """Base of every error that ds_seqpar raises on purpose."""


class ConfigError(SeqParError):
    """The DeepSpeed JSON, or an argument beside it, asks for something that cannot be done."""


class PlanError(SeqParError):
    """The model cannot be sharded exactly as asked; nothing of it was touched."""


class DataMismatchError(SeqParError):
    """The ranks of one tensor-parallel group were given different data."""


class CheckpointError(SeqParError):
    """A checkpoint cannot be written or read as asked; what was saved before is untouched."""


class VerificationError(SeqParError):
    """The sharded model does not compute what the unsharded one does; nothing was trained."""


class ReplicaMismatchError(SeqParError):
    """What all ranks of one tensor-parallel group hold alike has come apart."""


class RankLostError(SeqParError):
    """Another rank ended, raised, or did not arrive in time; this one was waiting for it."""
