"""Imports DeepSpeed, which logs to the standard output that it finds then; a command's own belongs to its answer."""

import contextlib
import os
import sys

# While `python -m ds_seqpar` looks for the module, sys.argv[0] is "-m".
_is_command = sys.argv[:1] == ["-m"] or os.path.basename((sys.argv or [""])[0]) == "ds_seqpar"

with contextlib.redirect_stdout(sys.stderr if _is_command else sys.stdout):
    import deepspeed  # noqa: F401
