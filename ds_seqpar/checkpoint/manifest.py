"""What a checkpoint says of itself: of which model, in how many parts, which file is whose. Plain JSON, no torch.

A file's fingerprint is made of the table of checksums that torch.save writes behind its tensors, so that it costs a few
kilobytes of reading however large the file is, and a truncated file has none.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..plan.cuts import Cut
from ..plan.report import ParameterEntry

__all__ = [
    "CONFIG_FOLDER", "IDENTITY_KEY", "MANIFEST", "cut_of", "describe_parameters", "fingerprint", "read_manifest", "require_files",
    "require_same_layout", "require_same_model",
]  # fmt: skip

MANIFEST = "ds_seqpar_manifest.json"
CONFIG_FOLDER = "huggingface"
"""The model's config, so that a checkpoint can be read where the model is not."""

IDENTITY_KEY = "ds_seqpar"
"""Where DeepSpeed's model files repeat the manifest, without the list of files."""

FORMAT = 1


def describe_parameters(entries: Mapping[str, ParameterEntry], dtypes: Mapping[str, str]) -> dict[str, Any]:
    """Name -> whole shape, dtype and cut, as JSON."""
    described = {}
    for name, dtype in dtypes.items():
        entry = entries[name]
        cut = None if entry.cut is None else {"dim": entry.cut.dim, "ranges": entry.cut.ranges}
        described[name] = {"shape": list(entry.shape), "dtype": dtype, "cut": cut}
    return described


def cut_of(described: Mapping[str, Any]) -> Cut | None:
    """The cut of one described parameter."""
    cut = described["cut"]
    if cut is None:
        return None
    ranges = tuple(tuple((int(a), int(b)) for a, b in parts) for parts in cut["ranges"])
    return Cut(int(cut["dim"]), int(described["shape"][cut["dim"]]), ranges)


def fingerprint(path: Path) -> str:
    """Of a file that torch.save wrote. Raises CheckpointError if it is not whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            # The name of the folder inside is the file's own name: a renamed file keeps its fingerprint without it.
            entries = [(i.filename.partition("/")[2], i.file_size, i.CRC) for i in archive.infolist()]
    except zipfile.BadZipFile as problem:
        raise CheckpointError(f"{path} is truncated or damaged ({problem})") from problem
    except FileNotFoundError as problem:
        raise CheckpointError(f"{path} is missing") from problem
    return hashlib.blake2b(repr(entries).encode(), digest_size=16).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises CheckpointError if the folder holds no complete checkpoint of ours."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}{_others(folder)}")
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it is incomplete, or was not saved by engine.save_checkpoint of a sharded model"
        ) from None
    except ValueError as problem:
        raise CheckpointError(f"{path} is damaged ({problem})") from problem
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} has a format that this version does not know; it reads format {FORMAT}")
    return manifest


def _others(folder: Path) -> str:
    if not folder.parent.is_dir():
        return ""
    names = sorted(p.name for p in folder.parent.iterdir() if (p / MANIFEST).is_file())
    return f"; {folder.parent} holds {names}" if names else ""


def require_files(folder: Path, manifest: Mapping[str, Any], mine: Mapping[str, int] | None = None) -> None:
    """Checks that all files of a checkpoint are there, and the contents of those a rank reads (`mine`: its tp_rank and dp_rank),
    or of all.

    Raises CheckpointError naming the first file that is missing, cut short, or another rank's or another save's.
    """
    files: Mapping[str, Any] = manifest["files"]
    owner = {about["fingerprint"]: name for name, about in files.items()}
    for name, about in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if mine is not None and not _is_read_by(about, mine):
            continue
        try:
            found = fingerprint(path)
        except CheckpointError as problem:
            raise CheckpointError(
                f"{problem}; it has {path.stat().st_size} bytes, of {about['size']} that were saved"
            ) from None
        if found == about["fingerprint"]:
            continue
        if found in owner:
            raise CheckpointError(f"{path} holds what {owner[found]} should hold: files of two ranks were swapped")
        raise CheckpointError(f"{path} is not the file that was saved here: it belongs to another save, or was changed")


def _is_read_by(about: Mapping[str, Any], mine: Mapping[str, int]) -> bool:
    return about["tp_rank"] == mine["tp_rank"] and about["dp_rank"] in (mine["dp_rank"], 0)


def require_same_model(where: Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises CheckpointError naming the first difference between the saved model and this one; cuts may differ."""
    if saved["model_type"] != here["model_type"]:
        raise CheckpointError(f"{where} holds a {saved['model_type']} model, this one is {here['model_type']}")
    theirs, ours = saved["parameters"], here["parameters"]
    for name in [*ours, *theirs]:
        if name not in theirs or name not in ours:
            lacks = "the checkpoint lacks" if name not in theirs else "this model lacks"
            raise CheckpointError(f"{where} is of another {here['model_type']} model: {lacks} {name}")
        if theirs[name]["shape"] != ours[name]["shape"]:
            raise CheckpointError(
                f"{where} is of another {here['model_type']} model: {name} has shape {theirs[name]['shape']} there and "
                f"{ours[name]['shape']} here"
            )
    if saved.get("tied", here["tied"]) != here["tied"]:
        there, now = ([name for names in about["tied"] for name in names] for about in (saved, here))
        raise CheckpointError(
            f"{where} is of another {here['model_type']} model: {there or 'nothing'} is tied there, {now or 'nothing'} here; "
            "use the same tie_word_embeddings"
        )
    for name, scaling in saved.get("scaling", here["scaling"]).items():
        if here["scaling"].get(name) != scaling:
            raise CheckpointError(
                f"{where} is of a model with other adapters: {name} is scaled by {scaling} there and "
                f"{here['scaling'].get(name)} here; use the same lora_alpha and r"
            )


def require_same_layout(where: Path, saved: Mapping[str, Any], here: Mapping[str, Any], *, optimizer: bool) -> None:
    """Raises CheckpointError if the run that saved was of another size than this one.

    `optimizer`: whether optimizer states are wanted, which are cut over the data-parallel ranks too.
    """
    way_out = (
        f"convert it (python -m deepspeed.checkpoint.ds_to_universal --input_folder {where} --output_folder ...) and load "
        'with "checkpoint": {"load_universal": true}'
    )
    if saved["tp_size"] != here["tp_size"]:
        raise CheckpointError(
            f"{where} was saved at tp_size {saved['tp_size']}, this run has {here['tp_size']}; {way_out}"
        )
    for name, described in here["parameters"].items():
        if cut_of(described) != cut_of(saved["parameters"][name]):
            raise CheckpointError(f"{where}: {name} was cut in another way by the version that saved it; {way_out}")
    stage_3 = saved["zero_stage"] == 3, here["zero_stage"] == 3
    if not optimizer and (stage_3[0] != stage_3[1] or (all(stage_3) and saved["dp_size"] != here["dp_size"])):
        raise CheckpointError(
            f"{where} was saved at ZeRO stage {saved['zero_stage']} by {saved['dp_size']} data-parallel ranks, this run has stage "
            f"{here['zero_stage']} and {here['dp_size']}, which read other files; write its weights with python -m ds_seqpar export and "
            f"start from them, or {way_out}"
        )
    if not optimizer:
        return
    sizes = saved["dp_size"], here["dp_size"]
    stages = saved["zero_stage"], here["zero_stage"]
    if sizes[0] != sizes[1] and stages != (0, 0):
        raise CheckpointError(
            f"{where} was saved by {sizes[0]} data-parallel ranks, this run has {sizes[1]}; {way_out}"
        )
    if _family(stages[0]) != _family(stages[1]):
        raise CheckpointError(f"{where} was saved at ZeRO stage {stages[0]}, this run has stage {stages[1]}; {way_out}")
    if saved["dtype"] != here["dtype"]:
        raise CheckpointError(
            f"{where} was saved in {saved['dtype']}, this run computes in {here['dtype']}; load it with load_module_only=True, "
            "or use the same precision"
        )


def _family(stage: int) -> int:
    """Stages 1 and 2 write the same files."""
    return 1 if stage == 2 else stage
