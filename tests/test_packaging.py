"""What is installed is the whole tree: the lists in setup.cfg, a wheel and a source distribution, made from a copy."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOTS = {"ds_seqpar": ROOT / "ds_seqpar", "ds_seqpar_integrations": ROOT / "integrations" / "ds_seqpar_integrations"}


def _folders() -> set[str]:
    found = set()
    for name, folder in ROOTS.items():
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir() and any(path.glob("*.py")):
                found.add(".".join([name, *path.relative_to(folder).parts]))
    return found


def _files() -> set[str]:
    return {
        str(Path(name, path.relative_to(folder)))
        for name, folder in ROOTS.items()
        for path in folder.rglob("*")
        if path.suffix in (".py", ".json") or path.name == "py.typed"
    }


def _setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_the_package_list_equals_the_tree() -> None:
    listed = _setup()["options"]["packages"].split()
    assert sorted(listed) == sorted(_folders())
    assert len(listed) == len(set(listed))


def test_every_package_folder_is_a_regular_package() -> None:
    for name in _folders():
        top, *rest = name.split(".")
        assert (ROOTS[top].joinpath(*rest) / "__init__.py").is_file(), f"{name} has no __init__.py"


def test_the_version_is_one_number() -> None:
    import ds_seqpar

    assert _setup()["metadata"]["version"] == ds_seqpar.__version__


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel and a source distribution; the wheel is built from the unpacked sdist, so both must be whole."""
    folder = tmp_path_factory.mktemp("packaging")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("ds_seqpar", "integrations"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def test_the_wheel_holds_every_module_and_type_marker(distributions: dict[str, Path]) -> None:
    held = {name for name in zipfile.ZipFile(distributions["wheel"]).namelist() if ".dist-info/" not in name}
    assert held == _files()
    assert {f"{name}/py.typed" for name in ROOTS} <= held


def test_the_wheel_carries_licence_and_requirements(distributions: dict[str, Path]) -> None:
    wheel = zipfile.ZipFile(distributions["wheel"])
    metadata = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    assert any(name.endswith("LICENSE") for name in wheel.namelist())
    for requirement in ("deepspeed", "safetensors", "torch", "transformers"):
        assert f"Requires-Dist: {requirement}" in metadata
    assert "Requires-Python: >=3.10" in metadata


def test_the_sdist_holds_what_a_build_needs(distributions: dict[str, Path]) -> None:
    with tarfile.open(distributions["sdist"]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {str(path.relative_to(ROOT)) for folder in ROOTS.values() for path in folder.rglob("*.py")}
    wanted |= {str((folder / "py.typed").relative_to(ROOT)) for folder in ROOTS.values()}
    assert wanted | {"setup.cfg", "pyproject.toml", "README.md", "LICENSE"} <= held
