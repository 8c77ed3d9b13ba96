"""A folder's new contents, written aside and put in its place when they are complete; nothing that is complete is ever deleted.

    the target is               written                                     put in its place
    not there                   beside it: .NAME.partial                    by a rename
    a folder                    beside it, in a folder that was made in it  by two renames; owner, mode and access lists stay
                                and moved out
    a folder that cannot be     in it: .ds_seqpar.partial                   file by file: what the old ones are loaded by leaves
    swapped (a mount point,                                                 first, what the new ones are loaded by comes last
    another user's parent, ...)

A finished folder is named .complete before anything is replaced, and what is replaced .before until it is cleared: whoever dies in
between, the next save or load ends it. What an older checkpoint leaves that is not of it stays in the target.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import ProcessGroup
from torch.distributed import get_rank as rank_in_run

from ..errors import CheckpointError
from .manifest import MANIFEST
from .rendezvous import agreed, from_first_rank

__all__ = ["Stale", "begin", "finish", "recover", "replacing", "surviving"]

Stale = Callable[[str], bool]
"""Whether a name in the folder is of the old checkpoint, so that it must not stay beside the new one."""


@contextmanager
def replacing(target: Path, stale: Stale, group: ProcessGroup | None, what: str) -> Iterator[Path]:
    """A folder to fill, the same on every rank, which takes the place of `target` after the body.

    The body raises CheckpointError on every rank or on none; then what was written is removed. `what` begins the messages.

    Raises CheckpointError on every rank.
    """
    writes = rank_in_run() == 0
    made: Path | None = None
    with agreed(f"{what} was not written", group):
        if writes:
            made = begin(target, stale)
    staging: Path = from_first_rank(made, group)
    try:
        yield staging
    except CheckpointError:
        if writes:  # it would keep a full disk full
            shutil.rmtree(staging, ignore_errors=True)
        raise
    with agreed(f"{what} was written, but is not in its place", group):
        if writes:
            finish(staging, target, stale)


def begin(target: Path, stale: Stale) -> Path:
    """An empty folder to be filled with what shall take the place of `target`. Raises CheckpointError if that is a file."""
    _require_folder(target)
    recover(target, stale)
    beside, inside = _beside(target), _inside(target)
    shutil.rmtree(beside.partial, ignore_errors=True)
    shutil.rmtree(inside.partial, ignore_errors=True)
    if not target.exists():
        beside.partial.mkdir(parents=True)
        return beside.partial
    inside.partial.mkdir()
    try:
        _make_alike(inside.partial, target)
        if os.path.samefile(target, os.curdir):  # this process would stand in a folder that is deleted
            return inside.partial
        inside.partial.rename(beside.partial)
    except OSError:
        return inside.partial
    return beside.partial


def finish(staging: Path, target: Path, stale: Stale) -> None:
    """Puts the folder that `begin` made in the place of `target`. Raises CheckpointError, saying where its files are, if it cannot."""
    complete = staging.with_name(staging.name.removesuffix("partial") + "complete")
    try:
        staging.rename(complete)
    except OSError as problem:
        raise CheckpointError(f"{target}: {problem}; its files are complete in {staging}") from problem
    _place(complete, target, stale)


def recover(target: Path, stale: Stale) -> None:
    """Ends a replacement of `target` that was cut off. Raises CheckpointError if a finished folder cannot be put in its place."""
    beside, inside = _beside(target), _inside(target)
    if beside.complete.exists():
        _place(beside.complete, target, stale)
    elif beside.before.exists() and not target.exists():
        beside.before.rename(target)
    elif beside.before.exists():
        _clear(beside.before, target, stale)
    if inside.complete.exists():
        _place(inside.complete, target, stale)
    elif inside.before.exists():
        _clear(inside.before, target, stale)


def surviving(target: Path) -> Path:
    """`target`, or where its replacement, if it was cut off between its two renames, left a whole one."""
    if target.exists():
        return target
    beside = _beside(target)
    return next((path for path in (beside.complete, beside.before) if path.exists()), target)


_PREFIX = ".ds_seqpar"


@dataclass(frozen=True)
class _Hidden:
    """The folders of a replacement, all in one place."""

    prefix: Path

    @property
    def partial(self) -> Path:
        """Being written."""
        return self.prefix.with_name(f"{self.prefix.name}.partial")

    @property
    def complete(self) -> Path:
        """Finished, and not in its place, or not all of it."""
        return self.prefix.with_name(f"{self.prefix.name}.complete")

    @property
    def leaving(self) -> Path:
        """What is replaced, as long as some of it is in its place."""
        return self.prefix.with_name(f"{self.prefix.name}.leaving")

    @property
    def before(self) -> Path:
        """What was replaced, all of it."""
        return self.prefix.with_name(f"{self.prefix.name}.before")


def _beside(target: Path) -> _Hidden:
    return _Hidden(target.with_name(f".{target.name}"))


def _inside(target: Path) -> _Hidden:
    return _Hidden(target / _PREFIX)


def _require_folder(target: Path) -> None:
    for path in (target, *target.parents):
        if path.exists():
            if not path.is_dir():
                raise CheckpointError(f"{path} is a file; give a folder, or move the file away")
            return


def _make_alike(folder: Path, target: Path) -> None:
    """Gives an empty folder the owner, mode and access lists of another. Raises OSError if that is not allowed."""
    own, wanted = folder.stat(), target.stat()
    if (own.st_uid, own.st_gid) != (wanted.st_uid, wanted.st_gid):
        os.chown(folder, wanted.st_uid, wanted.st_gid)
    shutil.copystat(target, folder)
    os.utime(folder)


def _place(complete: Path, target: Path, stale: Stale) -> None:
    beside, inside = _beside(target), _inside(target)
    try:
        if complete == inside.complete or not _swap(target):
            if complete == beside.complete:
                beside.complete.rename(inside.complete)
            _move_in(target, stale)
    except OSError as problem:
        new, old = (
            next((str(path) for path in paths if path.exists()), None)
            for paths in ((inside.complete, beside.complete), (inside.before, inside.leaving, beside.before))
        )
        where = f"its files are complete in {new}" + (f", those they replace are in {old}" if old else "")
        raise CheckpointError(f"{target}: {problem}; {where}") from problem
    for hidden in (beside, inside):
        if hidden.before.exists():
            _clear(hidden.before, target, stale)


def _swap(target: Path) -> bool:
    """The complete folder beside it becomes `target`, by renames alone; False if the system refuses to move `target` away."""
    beside = _beside(target)
    if target.exists():
        if not target.is_dir():
            raise NotADirectoryError(f"{target} became a file meanwhile")
        try:
            target.rename(beside.before)
        except OSError:
            return False
        try:
            beside.complete.rename(target)
        except OSError:
            beside.before.rename(target)
            return False
    else:
        beside.complete.rename(target)
    _sync(target.parent)
    return True


def _move_in(target: Path, stale: Stale) -> None:
    """What the complete folder in `target` holds, into it."""
    inside = _inside(target)
    if not inside.before.exists():
        inside.leaving.mkdir(exist_ok=True)
        old = [e for e in _in_order(target) if (inside.complete / e.name).exists() or stale(e.name)]
        try:
            for entry in reversed(old):
                entry.rename(inside.leaving / entry.name)
            inside.leaving.rename(inside.before)
        except OSError:
            for entry in _in_order(inside.leaving):
                entry.rename(target / entry.name)
            inside.leaving.rmdir()
            raise
        _sync(target)
    for entry in _in_order(inside.complete):
        entry.rename(target / entry.name)
    _sync(target)
    inside.complete.rmdir()


def _in_order(folder: Path) -> list[Path]:
    """What a folder holds, the files without which nobody loads it last."""
    return sorted((entry for entry in folder.iterdir() if not entry.name.startswith(f"{_PREFIX}.")), key=_turn)


def _turn(entry: Path) -> tuple[int, str]:
    index = entry.name == MANIFEST or entry.name.endswith(".index.json")
    return 2 * index + entry.name.endswith((".safetensors", ".bin", ".pt")), entry.name


def _clear(before: Path, target: Path, stale: Stale) -> None:
    """Old files of a checkpoint go, all others come back into `target`; the new one is in its place whether that succeeds or not."""
    try:
        _merge(before, target, stale)
    except OSError as problem:
        logging.getLogger("ds_seqpar").warning(
            "%s is complete; what it replaced could not be cleared from %s: %s", target, before, problem
        )


def _merge(before: Path, target: Path, stale: Stale) -> None:
    for entry in list(before.iterdir()):
        there, is_folder = target / entry.name, entry.is_dir() and not entry.is_symlink()
        if is_folder and there.is_dir() and not stale(entry.name):
            _merge(entry, there, stale)
        elif not os.path.lexists(there) and not stale(entry.name):
            entry.rename(there)
        elif is_folder:
            shutil.rmtree(entry)
        else:
            entry.unlink()
    before.rmdir()


def _sync(folder: Path) -> None:
    with suppress(OSError):  # a folder that may not be read
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
