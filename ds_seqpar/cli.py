"""`python -m ds_seqpar COMMAND ...`. A command is one entry of COMMANDS: what adds its arguments, and what runs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from .errors import SeqParError
from .families import RESULTS

__all__ = ["COMMANDS", "main", "table"]

AddArguments = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int]


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="CKPT_DIR", help="what engine.save_checkpoint wrote: its folder, or one tag's"
    )
    parser.add_argument("target", metavar="OUT_DIR", help="the Hugging Face checkpoint to write")
    parser.add_argument("--tag", help="which checkpoint of the folder; the latest if not given")
    parser.add_argument("--max-shard-size", default="50GB", help="of a weight file, such as 5GB (default: %(default)s)")


def _export(options: argparse.Namespace) -> int:
    """Turns a DeepSpeed checkpoint into a Hugging Face one, without GPUs or a process group."""
    from tqdm import tqdm

    from .checkpoint.offline import export_checkpoint

    with tqdm(unit="B", unit_scale=True, desc="export", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        export_checkpoint(
            options.source, options.target, tag=options.tag, max_shard_size=options.max_shard_size, progress=show
        )
    print(f"wrote {options.target}")
    return 0


def table() -> str:
    """Every measured model type as a Markdown table: type, where its plan is from, status, styles, what it was tested at."""
    lines = ["| type | plan | status | styles | tested at |", "|---|---|---|---|---|"]
    for name, result in sorted(RESULTS.items()):
        status = result["status"] + (f": {result['why']}" if result.get("why") else "")
        if result.get("whole"):
            status += f"; whole: {', '.join(result['whole'])}"
        if result.get("heads"):
            status += f"; with: {', '.join(result['heads'])}"
        cells = (name, result["plan"], status, ", ".join(result["styles"]), result["at"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _families(options: argparse.Namespace) -> int:
    """Prints the table of model types: exact or refused, by which styles, tested at which sizes."""
    print(table())
    return 0


COMMANDS: dict[str, tuple[AddArguments, Run]] = {
    "export": (_export_arguments, _export),
    "families": (_no_arguments, _families),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors of ours go to stderr in one line, with exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m ds_seqpar")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_arguments, run) in COMMANDS.items():
        about = (run.__doc__ or "").strip().splitlines()[0]
        add_arguments(commands.add_parser(name, help=about, description=about))
    options = parser.parse_args(argv)
    try:
        return COMMANDS[options.command][1](options)
    except SeqParError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
