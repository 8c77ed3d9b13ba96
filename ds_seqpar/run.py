"""`deepspeed --num_gpus N --module ds_seqpar.run train.py ...`: runs a script that never mentions ds_seqpar, with it imported."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from . import __version__
from .errors import ConfigError

__all__ = ["main"]

USAGE = """usage: deepspeed --num_gpus N --module ds_seqpar.run [-m] SCRIPT [ARGUMENTS ...]

Runs SCRIPT (with -m: the module of that name) exactly as the launcher would, after `import ds_seqpar`, so that
deepspeed.initialize looks for the "ds_seqpar" key in the DeepSpeed JSON."""


def main(argv: list[str]) -> None:
    """Runs the script named in `argv`; options that the launcher put before its name are passed on to it."""
    launcher = []
    while argv and argv[0].startswith("--local_rank"):
        launcher.append(argv.pop(0))
        if launcher[-1] == "--local_rank" and argv:
            launcher.append(argv.pop(0))
    as_module = bool(argv) and argv[0] == "-m"
    if as_module:
        argv = argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if argv else 2)
    if argv[0] == "--version":
        print(__version__)
        return
    script, arguments = argv[0], argv[1:]
    if as_module:
        sys.argv = [script, *launcher, *arguments]
        runpy.run_module(script, run_name="__main__", alter_sys=True)
        return
    if not Path(script).is_file():
        raise ConfigError(f"there is no script {script!r}; {USAGE}")
    sys.argv = [script, *launcher, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
