"""A CLIP tokenizer from the files of a folder that are nothing but data, none of which may lack:
transformers makes do with what is there, and every prompt then reads alike.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...concept.errors import IncompatibleModelError
from ...concept.plain import read_json
from ...concept.regular_files import read_regular
from ..open_clip.vocabulary import write_vocabulary

MOST_JSON_BYTES = 32 << 20
"""CLIP's tokenizer.json has four million"""
_FILES = "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"
_SETTINGS = {
    *("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens"),
    *("added_tokens_decoder", "add_prefix_space", "do_lower_case", "errors", "model_max_length"),
}
_MOST_MISSING = 128
"""Pieces that a text encoder may have room for without a word, and the other way round: tables are
rounded up to multiples, and words were added to some
"""


def read_tokenizer(folder: Path, rows: int) -> Any:
    """A `CLIPTokenizer`, padded as its settings say, for a text encoder of as many embeddings.

    Raises IncompatibleModelError that names the file that is missing, empty or cut short.
    """
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as name:
        clean = Path(name)
        added = _copy_vocabulary(folder, clean)
        settings = folder / "tokenizer_config.json"
        known = _object(settings) if settings.is_file() else {}
        plain = {name: known[name] for name in _SETTINGS if name in known}
        (clean / settings.name).write_text(json.dumps(plain), encoding="utf-8")
        _check_vocabulary(folder.name, clean, rows - added)
        tokenizer = CLIPTokenizer.from_pretrained(str(clean), local_files_only=True)
    if len(set(tokenizer("")["input_ids"])) != 2 or max(tokenizer("")["input_ids"]) >= rows:
        raise _broken(folder.name, "does not know the tokens that begin and end a text")
    return tokenizer


def _copy_vocabulary(folder: Path, clean: Path) -> int:
    """Copies pieces, merges and added words; returns how many of the last there are."""
    for name in _FILES:
        if (folder / name).is_file():
            (clean / name).write_bytes(read_regular(folder / name, MOST_JSON_BYTES))
    lacking = [name for name in _FILES[:2] if not (clean / name).is_file()]
    if lacking and not (folder / "tokenizer.json").is_file():
        raise _broken(folder.name, f"has no tokenizer.json and no {lacking[0]}")
    if lacking:
        _unpack(folder / "tokenizer.json", clean)
    file = clean / "added_tokens.json"
    return len(_object(file)) if file.is_file() else 0


def _unpack(file: Path, folder: Path) -> None:
    """The one file that transformers 5 writes, as the three that every release reads."""
    tokenizer = _object(file)
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
    write_vocabulary(folder, sorted(vocabulary, key=vocabulary.__getitem__), pairs)
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    beyond = {token: number for token, number in added.items() if token not in vocabulary}
    (folder / "added_tokens.json").write_text(json.dumps(beyond), encoding="utf-8")


def _check_vocabulary(part: str, folder: Path, rows: int) -> None:
    """That there is a piece for every embedding, and a merge for every piece that is not a byte."""
    pieces = _object(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merged = {"".join(line.split(" ")) for line in lines if not line.startswith("#version")}
    if abs(len(pieces) - rows) > _MOST_MISSING:
        raise _broken(
            part, f"holds {len(pieces)} pieces of words (vocab.json), and its text encoder {rows}"
        )
    lacking = [piece for piece in _joined(pieces) if piece not in merged]
    if len(lacking) > _MOST_MISSING:
        raise _broken(
            part,
            f"lacks {len(lacking)} of the {len(pieces)} merges by which words are put together "
            f"(merges.txt), that of {lacking[0]!r} for one",
        )


def _joined(pieces: Iterable[str]) -> Iterable[str]:
    """The pieces of more than one byte, which merges make; none of those like `<|endoftext|>`."""
    for piece in pieces:
        if len(piece.removesuffix("</w>")) > 1 and not (piece[0] == "<" and piece[-1] == ">"):
            yield piece


def _object(file: Path) -> Mapping[str, Any]:
    """The object in a JSON file."""
    place = f"{file.parent.name}/{file.name}"
    if not file.is_file():
        raise IncompatibleModelError(f"it has no {place}")
    text = read_regular(file, MOST_JSON_BYTES).decode()
    try:
        found = read_json(text)
    except ValueError as error:
        what = "is empty" if not text.strip() else f"is no JSON ({error})"
        raise IncompatibleModelError(f"its {file.name} of the tokenizer {what}") from error
    if not isinstance(found, dict):
        raise IncompatibleModelError(f"its {place} is no JSON object")
    return found


def _broken(part: str, what: str) -> IncompatibleModelError:
    return IncompatibleModelError(
        f"its {part} {what}: an interrupted download, as a rule. Prompts would all read alike, or "
        f"wrongly"
    )
