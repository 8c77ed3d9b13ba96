"""`python -m ds_seqpar COMMAND`: one function for each command, registered under its name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from .families import RESULTS

__all__ = ["COMMANDS", "families", "main", "table"]

Command = Callable[[argparse.ArgumentParser, Sequence[str]], None]


def table() -> str:
    """Every measured model type as a Markdown table: type, where its plan is from, status, styles, what it was tested at."""
    lines = ["| type | plan | status | styles | tested at |", "|---|---|---|---|---|"]
    for name, result in sorted(RESULTS.items()):
        status = result["status"] + (f": {result['why']}" if result.get("why") else "")
        if result.get("whole"):
            status += f"; whole: {', '.join(result['whole'])}"
        cells = (name, result["plan"], status, ", ".join(result["styles"]), result["at"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def families(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Prints the table of model types: exact or refused, by which styles, tested at which sizes."""
    parser.parse_args(argv)
    print(table())


COMMANDS: dict[str, Command] = {"families": families}


def main(argv: Sequence[str]) -> None:
    """Runs the command that `argv` names."""
    parser = argparse.ArgumentParser(prog="python -m ds_seqpar", description=__doc__)
    parser.add_argument(
        "command", choices=sorted(COMMANDS), help="; ".join(f"{n}: {c.__doc__}" for n, c in COMMANDS.items())
    )
    command = parser.parse_args(argv[:1]).command
    run = COMMANDS[command]
    run(argparse.ArgumentParser(prog=f"python -m ds_seqpar {command}", description=run.__doc__), argv[1:])
