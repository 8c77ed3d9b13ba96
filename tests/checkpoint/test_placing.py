"""A save goes into any folder that its user may write to, and whatever stops it deletes nothing that is complete."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from training import engine_at, run, weights
from transformers import AutoModelForCausalLM

import ds_seqpar
from ds_seqpar.checkpoint.offline import export_checkpoint
from ds_seqpar.checkpoint.placing import begin, finish, recover
from ds_seqpar.checkpoint.writing import weights_of_a_model
from ds_seqpar.errors import CheckpointError

STALE = weights_of_a_model("model.safetensors")
WAYS = ("swapped", "in place")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Makes a folder of tmp_path a mount point: of a file system of its own, or, with `bind`, of another folder of the same one."""
    made: list[Path] = []

    def mount(name: str, bind: bool = False) -> Path:
        target = tmp_path / name
        target.mkdir()
        (tmp_path / f"{name} outside").mkdir()
        what = ["--bind", str(tmp_path / f"{name} outside")] if bind else ["-t", "tmpfs", "none"]
        done = subprocess.run(["mount", *what, str(target)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"needs the right to mount ({done.stderr.strip()}): run as root")
        made.append(target)
        return target

    yield mount
    for target in made:
        subprocess.run(["umount", "-l", str(target)], check=True)


def _write(folder: Path, version: str, shards: int) -> None:
    """A checkpoint as Hugging Face lays it out, every file of which says its version."""
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
    for name in (*names, "config.json", "added_tokens.json"):
        (folder / name).write_text(version)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"files": names, "version": version}))


def _versions(folder: Path) -> set[str]:
    """Of all that transformers would read, "none" for a file it can do without. Raises FileNotFoundError if it would find no weights, or
    not all."""
    optional = folder / "added_tokens.json"
    found = {optional.read_text() if optional.is_file() else "none"}
    if (folder / "model.safetensors").is_file():
        return found | {(folder / name).read_text() for name in ("config.json", "model.safetensors")}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return found | {index["version"], *((folder / name).read_text() for name in ("config.json", *index["files"]))}


def _others(folder: Path) -> None:
    """What a user keeps beside a checkpoint."""
    (folder / "checkpoint-5").mkdir()
    for name in ("notes.txt", "model_ema.safetensors", "checkpoint-5/model.safetensors"):
        (folder / name).write_text("the user's")


def _others_are_there(folder: Path) -> bool:
    names = ("notes.txt", "model_ema.safetensors", "checkpoint-5/model.safetensors")
    return all((folder / name).is_file() and (folder / name).read_text() == "the user's" for name in names)


def _refuse_to_move(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system does with a mount point."""
    plain = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if self == target:
            raise OSError(errno.EBUSY, "Device or resource busy", str(self))
        if self.parent == target and Path(to).parent == target.parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(self))
        return plain(self, to)

    monkeypatch.setattr(Path, "rename", rename)


@pytest.mark.parametrize("where", ["a folder", "as if a mount point", "a mount point", "a bind mount", "the current folder"])
@pytest.mark.parametrize(("old", "new"), [(3, 1), (1, 3), (2, 3)])
def test_a_checkpoint_takes_anothers_place(
    tmp_path: Path, where: str, old: int, new: int, mounted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "mount" in where and "as if" not in where:
        target = mounted("target", bind="bind" in where)
    else:
        target = tmp_path / "target"
        target.mkdir()
    if where == "as if a mount point":
        _refuse_to_move(target, monkeypatch)
    elif where == "the current folder":
        monkeypatch.chdir(target)
    target.chmod(0o2700)
    _write(target, "old", old)
    _others(target)
    before = target.stat()
    around = sorted(p.name for p in tmp_path.iterdir())
    staging = begin(target, STALE)
    assert _versions(target) == {"old"} and not stat.S_IMODE(staging.stat().st_mode) & 0o077
    _write(staging, "new", new)
    finish(staging, target, STALE)
    assert _versions(target) == {"new"} and _others_are_there(target)
    assert len([p for p in target.iterdir() if STALE(p.name)]) == new + (new > 1), "weights of the old one are left"
    after = target.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert (after.st_ino == before.st_ino) == (where != "a folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == around and not list(target.glob(".*"))
    assert Path.cwd().is_dir()


def _replace(target: Path, way: str, stop: Callable[[int], None]) -> None:
    """Replaces `target` by a new checkpoint; `stop` is told the number of every move before it is made."""
    if way == "in place":
        _refuse_to_move(target, pytest.MonkeyPatch())
    staging = begin(target, STALE)
    _write(staging, "new", 3)
    plain, count = Path.rename, itertools.count()

    def rename(self: Path, to: Path) -> Path:
        stop(next(count))
        return plain(self, to)

    Path.rename = rename  # type: ignore[method-assign, assignment]
    try:
        finish(staging, target, STALE)
    finally:
        Path.rename = plain  # type: ignore[method-assign]


def _die_at(target: str, way: str, step: int) -> None:
    _replace(Path(target), way, lambda now: os._exit(7) if now == step else None)


def _prepared(tmp_path: Path) -> Path:
    target = tmp_path / "target"
    shutil.rmtree(tmp_path, ignore_errors=True)
    target.mkdir(parents=True)
    _write(target, "old", 2)
    _others(target)
    return target


def _read(target: Path) -> set[str]:
    """Versions of what is found, none if nothing is."""
    try:
        return _versions(target)
    except FileNotFoundError:
        return set()


@pytest.mark.parametrize("way", WAYS)
def test_dying_at_any_move_leaves_one_checkpoint_or_none_and_the_next_save_ends_it(tmp_path: Path, way: str) -> None:
    for step in itertools.count():
        target = _prepared(tmp_path / "x")
        child = os.fork()
        if not child:
            try:
                _die_at(str(target), way, step)
            finally:
                os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        found = _read(target)
        assert len(found) <= 1, f"{way}, move {step}: the files of two checkpoints would be read together"
        if way == "in place" or died is False:
            assert _others_are_there(target)
        recover(target, STALE)
        assert _versions(target) == ({"old"} if step == 0 else {"new"}), f"{way}, move {step}"
        assert _others_are_there(target)
        staging = begin(target, STALE)
        _write(staging, "newest", 1)
        finish(staging, target, STALE)
        assert _versions(target) == {"newest"} and _others_are_there(target)
        assert [p.name for p in target.parent.iterdir()] == ["target"] and not list(target.glob(".*"))
        if not died:
            break
    assert step > 4


def _fail_from(step: int, once: bool) -> Callable[[int], None]:
    def stop(now: int) -> None:
        if now == step or (now > step and not once):
            raise OSError(errno.EIO, "Input/output error")

    return stop


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_move_that_fails_keeps_all_that_is_complete_and_says_where(
    tmp_path: Path, way: str, once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for step in itertools.count():
        target = _prepared(tmp_path / "x")
        plain = Path.rename
        try:
            _replace(target, way, _fail_from(step, once))
            failed = None
        except CheckpointError as problem:
            failed = str(problem)
        finally:
            Path.rename = plain  # type: ignore[method-assign]
        if failed is None:
            if _versions(target) == {"new"} and _others_are_there(target) and not list(target.parent.glob(".*")):
                if not list(target.glob(".*")) and step > 4:
                    break
                continue
            assert "could not be cleared from" in caplog.text and _versions(target) == {"new"}
        else:
            there = re.search(r"complete in (\S+?)(?:, those they replace are in (\S+))?$", failed)
            assert "Input/output error" in failed and there, failed
            # What was moved in part is in the target already, or still.
            for place, version, count in ((there[1], "new", 6), (there[2], "old", 5)):
                files = [p for folder in {place or target, target} for p in Path(folder).glob("*") if p.is_file()]
                assert len([p for p in files if version in p.read_text()]) == count, f"{way}, move {step}: {failed}"
            assert _read(target) in ({"old"}, set())
        recover(target, STALE)
        if not (target.parent / ".target.partial").exists() and not (target / ".ds_seqpar.partial").exists():
            assert _versions(target) == {"new"}
        assert _others_are_there(target)


def test_a_file_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("the user's")
    for target in (tmp_path / "file", tmp_path / "file" / "inside" / "deeper"):
        with pytest.raises(CheckpointError, match=r"/file is a file; give a folder"):
            begin(target, STALE)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "the user's"


WRITERS: dict[str, Callable[[Any, str], object]] = {
    "save_pretrained": lambda engine, folder: ds_seqpar.save_pretrained(engine, folder),
    "pickled": lambda engine, folder: ds_seqpar.save_pretrained(engine, folder, safe_serialization=False),
    "save_16bit_model": lambda engine, folder: engine.save_16bit_model(folder),
    "save_checkpoint": lambda engine, folder: engine.save_checkpoint(folder, tag="tag"),
    "an existing tag": lambda engine, folder: engine.save_checkpoint(str(Path(folder).parent), tag=Path(folder).name),
    "adapters": lambda engine, folder: ds_seqpar.save_pretrained(engine, folder),
}


def _save_everything(folders: dict[str, str], times: int, user: int | None) -> dict[str, Any]:
    """By every writer into a folder of its own, `times` times; rank 0's weights, and the messages of what was refused."""
    engine, adapted = engine_at("llama", 2, 1), engine_at("llama", 2, 1, lora=True)
    run(engine, 0, 1)
    found: dict[str, Any] = {"weights": weights(engine)}
    os.umask(0o022)
    if user is not None and os.geteuid() == 0:
        os.seteuid(user)
    try:
        for _, (name, folder) in itertools.product(range(times), folders.items()):
            try:
                WRITERS[name](adapted if name == "adapters" else engine, folder)
            except ds_seqpar.CheckpointError as problem:
                found[name] = str(problem)
    finally:
        os.seteuid(os.getuid())
    return found


def _check_folders(folders: dict[str, str], found: list[dict[str, Any]]) -> None:
    assert all(each.keys() == {"weights"} for each in found), found
    for name in folders.keys() & {"save_pretrained", "pickled", "save_16bit_model"}:
        loaded = AutoModelForCausalLM.from_pretrained(folders[name], use_safetensors=name == "save_pretrained").state_dict()
        assert all(torch.equal(x, found[0]["weights"][n]) for n, x in loaded.items()), name
    for name in folders.keys() & {"save_checkpoint", "an existing tag"}:
        with tempfile.TemporaryDirectory() as out:
            source = Path(folders[name], "tag") if name == "save_checkpoint" else Path(folders[name])
            export_checkpoint(source, out)  # an existing folder of another kind
            assert (Path(out) / "model.safetensors").is_file()
    for folder in folders.values():
        assert not list(Path(folder).glob(".*")) and (Path(folder) / "notes.txt").read_text() == "the user's"


def test_every_writer_writes_into_a_mount_point(mounted: Callable[..., Path]) -> None:
    folders = {name: str(mounted(name)) for name in WRITERS}
    for folder in folders.values():
        Path(folder, "notes.txt").write_text("the user's")
    _check_folders(folders, run_ranks(2, _save_everything, folders, 2, None))


@pytest.mark.parametrize("mode", [0o555, pytest.param(0o1777, marks=pytest.mark.slow)])
def test_every_writer_writes_into_the_users_folder_of_a_parent_that_is_not(mode: int) -> None:
    """0o1777: everybody may make files there, and nobody move another's (/tmp)."""
    parent = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    # DeepSpeed's `latest` lies beside a tag, so a tag's own folder in a parent that is closed is not for it.
    folders = {name: str(parent / name) for name in WRITERS if name != "an existing tag"}
    for folder in folders.values():
        Path(folder).mkdir(mode=0o700)
        Path(folder, "notes.txt").write_text("the user's")
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
            os.chown(Path(folder, "notes.txt"), 65534, 65534)
    parent.chmod(mode)
    try:
        found = run_ranks(2, _save_everything, folders, 2, 65534)
        _check_folders(folders, found)
        for folder in folders.values():
            about = Path(folder).stat()
            assert stat.S_IMODE(about.st_mode) == 0o700 and (os.geteuid() or about.st_uid == 65534)
        assert sorted(p.name for p in parent.iterdir()) == sorted(folders), "something is left beside them"
    finally:
        parent.chmod(0o700)
        shutil.rmtree(parent)


def test_a_file_in_the_way_is_refused_by_every_writer_on_every_rank(tmp_path: Path) -> None:
    folders = {name: str(tmp_path / name) for name in WRITERS}
    for folder in folders.values():
        Path(folder).write_text("the user's")
    first, second = run_ranks(2, _save_everything, folders, 1, None)
    assert {n: m for n, m in first.items() if n != "weights"} == {n: m for n, m in second.items() if n != "weights"}
    for name, folder in folders.items():
        assert f"{folder} is a file; give a folder" in first[name]
        assert Path(folder).read_text() == "the user's"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(folders), "something was written"


def _adapters_into_the_base(folder: str) -> None:
    ds_seqpar.save_pretrained(engine_at("llama", 2, 1), folder)
    Path(folder, "adapter_model.bin").write_text("of older adapters") if dist.get_rank() == 0 else None
    ds_seqpar.save_pretrained(engine_at("llama", 2, 1, lora=True), folder)


def test_adapters_leave_the_base_model_in_their_folder(tmp_path: Path) -> None:
    run_ranks(2, _adapters_into_the_base, str(tmp_path / "x"))
    names = {p.name for p in (tmp_path / "x").iterdir()}
    assert names >= {"model.safetensors", "config.json", "adapter_model.safetensors"} and "adapter_model.bin" not in names


def _fails_on_one_rank(folder: str, failing: int) -> str:
    """The last thing that can fail after the new files are complete: their way into their place."""
    engine = engine_at("llama", 2, 1)
    engine.save_checkpoint(folder, tag="tag")
    ds_seqpar.save_pretrained(engine, f"{folder}/exported")
    plain = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if ".complete" in str(self):
            raise OSError(errno.EIO, "Input/output error")
        return plain(self, to)

    Path.rename = rename  # type: ignore[method-assign, assignment]
    messages = []
    for call in (
        lambda: engine.save_checkpoint(folder, tag="tag"),
        lambda: ds_seqpar.save_pretrained(engine, f"{folder}/exported"),
    ):
        with pytest.raises(ds_seqpar.CheckpointError) as caught:
            call()
        messages.append(str(caught.value))
    Path.rename = plain  # type: ignore[method-assign]
    return "\n".join(messages)


def test_complete_files_that_have_no_place_are_kept_and_named_on_every_rank(tmp_path: Path) -> None:
    first, second = run_ranks(2, _fails_on_one_rank, str(tmp_path), 0)
    assert first == second
    for name in ("tag", "exported"):
        assert re.search(
            rf"{name} was written, but is not in its place: .*Input/output error; its files are complete in .*\.{name}\.complete",
            first,
        ), first
    AutoModelForCausalLM.from_pretrained(tmp_path / ".exported.complete")
    AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    export_checkpoint(tmp_path / ".tag.complete", tmp_path / "from the new one")
    export_checkpoint(tmp_path / "tag", tmp_path / "from the old one")

