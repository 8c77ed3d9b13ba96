"""`python -m ds_seqpar COMMAND ...`. A command is one entry of COMMANDS: what adds its arguments, and what runs it."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from .errors import SeqParError
from .families import RESULTS
from .planner.command import (
    calibrate_arguments,
    info_arguments,
    plan_arguments,
    run_calibrate,
    run_info,
    run_plan,
)

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
        if result.get("saved"):
            status += f": {result['saved']}"
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
    """Prints the table of model types: exact, refused or not run, by which styles, tested at which sizes."""
    print(table())
    return 0


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh"])


def _completion(options: argparse.Namespace) -> int:
    """Prints the script that completes `ds_seqpar` in a shell: eval "$(ds_seqpar completion bash)"."""
    print(completion_script(options.shell))
    return 0


def completion_script(shell: str) -> str:
    """For the installed command `ds_seqpar`: commands, then their options, then files."""
    words = {}
    for name, (add_arguments, _) in COMMANDS.items():
        parser = argparse.ArgumentParser(name)
        add_arguments(parser)
        words[name] = " ".join(option for action in parser._actions for option in action.option_strings)
    cases = "\n".join(
        f'    {name}) COMPREPLY+=($(compgen -W "{options}" -- "$word"));;' for name, options in words.items()
    )
    setup = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return f"""{setup}_ds_seqpar() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}"
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$word")); return; fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  COMPREPLY+=($(compgen -f -- "$word"))
}}
complete -F _ds_seqpar ds_seqpar"""


COMMANDS: dict[str, tuple[AddArguments, Run]] = {
    "export": (_export_arguments, _export),
    "families": (_no_arguments, _families),
    "plan": (plan_arguments, run_plan),
    "calibrate": (calibrate_arguments, run_calibrate),
    "info": (info_arguments, run_info),
    "completion": (_completion_arguments, _completion),
}

EXAMPLES = """\
examples:
  python -m ds_seqpar plan llama --seq 131072 --gpus 8 --gpu-memory 80GiB
        what fits a Llama of transformers' default sizes on 8 GPUs, best first, with the time of a step
  python -m ds_seqpar plan my-checkpoint --seq 65536 --gpus 16 --nodes 2 --write ds.json
        the same for a checkpoint folder, and the DeepSpeed JSON of the best choice
  python -m ds_seqpar info my-checkpoint
        versions, GPUs, and what becomes of every module of the model
  python -m ds_seqpar COMMAND --help
        everything about a command
"""


class _OneLine(argparse.ArgumentParser):
    """A parser whose errors are one line and exit status 2, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help says more)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLine(
        prog="python -m ds_seqpar",
        description="Megatron tensor + sequence parallelism for Hugging Face models under DeepSpeed. Training itself needs no command: "
        'add "ds_seqpar": {"tp_size": 2} to your DeepSpeed JSON.',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_arguments, run) in COMMANDS.items():
        about = (run.__doc__ or "").strip().splitlines()[0]
        add_arguments(commands.add_parser(name, help=about, description=about))
    return parser


def _with_negatives(argv: Sequence[str]) -> list[str]:
    """--gpu-memory -80GiB as --gpu-memory=-80GiB: argparse would take the size for an option and not say what is wrong with it."""
    words: list[str] = []
    for word in argv:
        if words and words[-1].startswith("--") and "=" not in words[-1] and re.match(r"-\d", word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; errors of ours go to stderr in one line, with exit status 1."""
    options = _parser().parse_args(_with_negatives(sys.argv[1:] if argv is None else argv))
    try:
        return COMMANDS[options.command][1](options)
    except SeqParError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
