"""Text files, JSONL files or Python's own source, split by document and packed into rows of tokens."""

from __future__ import annotations

import json
import random
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["DataError", "Document", "pack", "read_documents", "split_documents", "standard_library"]

HELD_OUT_EVERY = 10
ROWS_TO_DRAW_FROM = 8  # times the rows wanted
NOT_TRAINED_ON = {"encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}


class DataError(ValueError):
    """The given text cannot be trained on."""


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str


def standard_library() -> list[Document]:
    """The source files of the running Python's standard library, without tests and tables."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in sorted(root.rglob("*.py")) if not NOT_TRAINED_ON.intersection(p.relative_to(root).parts)]
    documents = [_read_text(p, p.relative_to(root).as_posix()) for p in paths]
    if not documents:
        raise DataError(f"no Python source lies in {root}; pass your own text with --text")
    return documents


def read_documents(paths: Sequence[Path], jsonl_field: str) -> list[Document]:
    """Every given file (a folder means every .txt, .md, .py and .jsonl file in it); a JSONL line is one document.

    Raises DataError for what is missing, empty or malformed, naming file and line.
    """
    documents: list[Document] = []
    for path in paths:
        found: list[Document] = []
        for file in _files(path):
            found += _read_jsonl(file, jsonl_field) if file.suffix == ".jsonl" else [_read_text(file, str(file))]
        if not any(document.text.strip() for document in found):
            raise DataError(f"{path} holds no text")
        documents += found
    return documents


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path} does not exist")
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in {".jsonl", ".md", ".py", ".txt"})
    if not files:
        raise DataError(f"the folder {path} holds no .txt, .md, .py or .jsonl file")
    return files


def _read_text(path: Path, name: str) -> Document:
    return Document(name, path.read_text(encoding="utf-8", errors="replace"))


def _read_jsonl(path: Path, field: str) -> Iterator[Document]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number} is not JSON ({error})") from error
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                has = sorted(row) if isinstance(row, dict) else type(row).__name__
                raise DataError(f'{path}:{number} has no text in the field "{field}" (it has {has}); use --jsonl-field')
            yield Document(f"{path}:{number}", row[field])


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held out): one document in ten by a hash of its name, so that every run splits alike.

    Where that leaves a side empty (one file, say), the last tenth of every document is held out.
    """
    parts: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        parts[zlib.crc32(document.name.encode()) % HELD_OUT_EVERY == 0].append(document)
    if all(parts):
        return parts
    cuts = [(d, len(d.text) - len(d.text) // HELD_OUT_EVERY) for d in documents]
    return [Document(d.name, d.text[:cut]) for d, cut in cuts], [Document(d.name, d.text[cut:]) for d, cut in cuts]


def pack(documents: Sequence[Document], tokenizer: Any, seq_len: int, rows: int, seed: int) -> torch.Tensor:
    """[n, seq_len] token ids, 1 <= n <= rows: shuffled documents end to end, each closed by the end-of-text token.

    The rows are drawn from more text than they need, so that a few rows come from many documents.

    Raises DataError if there is not one full row.
    """
    import torch

    order, generator = list(documents), random.Random(seed)
    generator.shuffle(order)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for document in order:
        if len(tokens) >= ROWS_TO_DRAW_FROM * rows * seq_len:
            break
        tokens += tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"] + end
    available = len(tokens) // seq_len
    if available == 0:
        raise DataError(f"{len(tokens)} tokens do not fill one row of {seq_len}; give more text or a smaller --seq-len")
    chosen = generator.sample(range(available), min(rows, available))
    return torch.tensor([tokens[row * seq_len : (row + 1) * seq_len] for row in chosen])
