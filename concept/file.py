"""The concept file: one `.safetensors` that this pack reads whole and stock LoRA loaders can apply.

docs/concept-format.md describes it for other tools. Reading never unpickles.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .atomic import write_atomically
from .concept import Concept, Delta, DenseDelta, LowRankDelta, ModifierToken
from .errors import ConceptFileError, CustomDiffusionError, OtherFileError
from .layers import FAMILIES, is_cross_attention, is_projection
from .naming import write_new

FORMAT = "custom-diffusion-concept"
FORMAT_VERSION = "1.0"

_WEIGHT_PREFIX = "diffusion_model."
_DELTA_PARTS = ("diff", "lora_up.weight", "lora_down.weight", "alpha")
_EMBEDDING_PREFIX = "bundle_emb."
_SINGLE_ENCODER_SUFFIX = "string_to_param.*"


def write_concept(
    concept: Concept,
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float16,
    *,
    replace: bool = True,
) -> Path:
    """Writes the concept, in half precision unless asked otherwise; the file is complete or absent.

    Raises ConceptFileError when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    # Copies: the layers of a merged concept share their `down`, which safetensors refuses to write.
    tensors = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in concept_tensors(concept.to(dtype)).items()
    }
    metadata = _metadata(concept, path.stem)
    write_atomically(
        path,
        lambda temporary: save_file(tensors, temporary, metadata),
        expected_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        replace=replace,
    )
    return path


def write_new_concept(
    concept: Concept, folder: Path, name: str, dtype: torch.dtype = torch.float16
) -> Path:
    """`write_concept` to `folder/name.safetensors`, or with a number where that exists already."""
    return write_new(folder, name, lambda path: write_concept(concept, path, dtype, replace=False))


def size_of(path: Path) -> str:
    """Of a file, for people: 38.3 MB, or 5 kB where it is less than a tenth of one."""
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.0f} kB"


def read_concept(path: str | os.PathLike[str]) -> Concept:
    """Reads a concept file. Raises ConceptFileError saying what is wrong with it."""
    path = Path(path)
    return concept_of(path, *read_tensors(path))


def concept_of(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Concept:
    """The concept in what was read from `path`. Raises ConceptFileError."""
    _check_format(path, metadata)
    try:
        concept = Concept(
            family=FAMILIES[metadata["base_family"]],
            deltas=_deltas(tensors),
            tokens=_tokens(tensors, metadata),
            base_hash=metadata.get("base_hash", ""),
            constraint_prompts=_constraint_prompts(metadata),
            provenance=_provenance(metadata),
        )
        _check_widths(concept)
        return concept
    except CustomDiffusionError as error:
        raise ConceptFileError(f"{path.name}: {error}") from error
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ConceptFileError(
            f"{path.name} calls itself a concept file but is damaged ({type(error).__name__}: "
            f"{error}). Save the concept again, or take another copy of the file."
        ) from error


def read_metadata(path: Path) -> dict[str, str]:
    """What a concept file says of itself, without its tensors. Raises ConceptFileError;
    OtherFileError for files of other tools, which are not opened.
    """
    if path.suffix != ".safetensors" and path.is_file():
        raise OtherFileError(
            f"{path.name} is another tool's file. The node Load Concept and the command "
            "`custom-diffusion import` make a concept of it."
        )
    with _opened(path) as file:
        metadata = dict(file.metadata() or {})
    _check_format(path, metadata)
    return metadata


def concept_tensors(concept: Concept) -> dict[str, Tensor]:
    """The tensors of the file, under the names that stock LoRA and embedding loaders read."""
    tensors = {
        f"{_WEIGHT_PREFIX}{layer}.{name}": tensor
        for layer in concept.layers
        for name, tensor in concept.deltas[layer].tensors().items()
    }
    for token in concept.tokens:
        for encoder, embedding in token.embeddings.items():
            tensors[_embedding_key(token.name, encoder, len(token.embeddings))] = embedding
    return tensors


def _embedding_key(token: str, encoder: str, encoders: int) -> str:
    return f"{_EMBEDDING_PREFIX}{token}.{encoder if encoders > 1 else _SINGLE_ENCODER_SUFFIX}"


def _metadata(concept: Concept, title: str) -> dict[str, str]:
    tokens = [
        {"name": t.name, "class_noun": t.class_noun, "initializer": t.initializer}
        for t in concept.tokens
    ]
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base_family": concept.family.name,
        "base_hash": concept.base_hash,
        "tokens": json.dumps(tokens, ensure_ascii=False),
        "constraint_prompts": json.dumps(concept.constraint_prompts, ensure_ascii=False),
        "provenance": json.dumps(concept.provenance, ensure_ascii=False),
        "created": now,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{concept.family.architecture}/lora",
        "modelspec.implementation": "custom-diffusion",
        "modelspec.title": title,
        "modelspec.date": now,
        "modelspec.trigger_phrase": ", ".join(
            f"{t.name} {t.class_noun}".strip() for t in concept.tokens
        ),
    }


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of any .safetensors. Raises ConceptFileError."""
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return tensors, dict(file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise ConceptFileError(
            f"There is no concept file {path}. Check the name, or train and save the concept first."
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise ConceptFileError(
            f"{path.name} is not a readable concept file: {_diagnosis(path)} ({error})."
        ) from error


def _diagnosis(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            start, brace = file.read(8), file.read(1)
    except OSError as error:
        return f"it cannot be opened: {error.strerror}. Check its permissions"
    # The length that a .safetensors begins with can be any of these bytes; a brace follows it.
    if brace != b"{" and start[:2] in (b"PK", *(bytes([0x80, n]) for n in range(2, 6))):
        return (
            "it is a pickle with another name, and pickles can run code when opened, so it was "
            "not. Ask for the concept as .safetensors"
        )
    size = path.stat().st_size
    header = int.from_bytes(start, "little")
    if len(start) < 8 or header > size - 8:
        return (
            f"it is truncated, or not a .safetensors file at all: it has {size} bytes. "
            "Copy or download it again, or save the concept again"
        )
    return "its header is damaged or its end is missing. Copy it again, or save the concept again"


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise OtherFileError(
            f"{path.name} is a .safetensors file but not a concept: its metadata has no 'format: "
            f"{FORMAT}'. Of a LoRA, a delta or an embedding, the node Load Concept and the command "
            "`custom-diffusion import` make one."
        )
    version = metadata.get("format_version", "")
    readable = FORMAT_VERSION.split(".")[0]
    if not version:
        raise ConceptFileError(
            f"{path.name} is a concept without a format version; {readable}.x is needed. "
            f"Its metadata was damaged: save the concept again, or take another copy of the file."
        )
    if version.split(".")[0] != readable:
        raise ConceptFileError(
            f"{path.name} has concept format {version}; this version of the pack reads "
            f"{readable}.x. Update the pack."
        )
    if metadata.get("base_family") not in FAMILIES:
        raise ConceptFileError(
            f"{path.name} was trained on the unknown model family {metadata.get('base_family')!r}; "
            f"known are {', '.join(FAMILIES)}. Update the pack."
        )


def _deltas(tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(_WEIGHT_PREFIX):
            path = key.removeprefix(_WEIGHT_PREFIX)
            name = next((name for name in _DELTA_PARTS if path.endswith(f".{name}")), "")
            layer = path.removesuffix(f".{name}")
            groups.setdefault(layer, {})[name] = tensor
    return {layer: _delta(layer, parts) for layer, parts in groups.items()}


def _delta(layer: str, parts: Mapping[str, Tensor]) -> Delta:
    if not is_cross_attention(layer):
        raise ValueError(f"{layer} is no matrix of a cross-attention layer")
    for name, tensor in parts.items():
        if name != "alpha":
            _check_matrix(f"{layer}.{name}", tensor)
    if parts.keys() == {"diff"}:
        return DenseDelta(parts["diff"])
    if parts.keys() != {*_DELTA_PARTS} - {"diff"}:
        raise ValueError(f"{layer} has {sorted(parts)}, needed 'diff' or up, down and alpha")
    delta = LowRankDelta(parts["lora_up.weight"], parts["lora_down.weight"])
    if delta.rank == 0 or delta.rank != len(delta.down):
        up, down = tuple(delta.up.shape), tuple(delta.down.shape)
        raise ValueError(f"{layer}: up {up} and down {down} do not chain")
    scale = float(parts["alpha"]) / delta.rank
    if not math.isfinite(scale):
        raise ValueError(f"{layer}.alpha is not finite")
    return delta if scale == 1.0 else delta.scaled(scale)


def _tokens(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[ModifierToken, ...]:
    encoders = FAMILIES[metadata["base_family"]].text_encoders
    described: list[dict[str, Any]] = json.loads(metadata.get("tokens", "[]"))
    tokens = []
    for token in described:
        embeddings = {}
        for encoder, width in encoders.items():
            key = _embedding_key(token["name"], encoder, len(encoders))
            embeddings[encoder] = torch.atleast_2d(tensors[key])
            _check_matrix(key, embeddings[encoder], width)
        tokens.append(
            ModifierToken(
                name=token["name"],
                class_noun=token["class_noun"],
                initializer=token.get("initializer", ""),
                embeddings=embeddings,
            )
        )
    return tuple(tokens)


def _constraint_prompts(metadata: Mapping[str, str]) -> tuple[str, ...]:
    prompts = json.loads(metadata.get("constraint_prompts", "[]"))
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("constraint_prompts is not a list of texts")
    return tuple(prompts)


def _provenance(metadata: Mapping[str, str]) -> dict[str, Any]:
    provenance = json.loads(metadata.get("provenance", "{}"))
    if not isinstance(provenance, dict):
        raise ValueError("provenance is not a JSON object")
    return provenance


def _check_matrix(name: str, tensor: Tensor, width: int | None = None) -> None:
    fits = tensor.ndim == 2 and tensor.numel() > 0 and width in (None, tensor.shape[1])
    if not (fits and tensor.is_floating_point()):
        wanted = f"(n, {width})" if width else "a matrix"
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, needed floats {wanted}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds values that are not finite")


def _check_widths(concept: Concept) -> None:
    width = concept.family.context_width
    if not concept.deltas and not concept.tokens:
        raise ValueError("it holds neither projections nor tokens")
    for layer, delta in concept.deltas.items():
        if is_projection(layer) and delta.shape[1] != width:
            raise ValueError(
                f"{layer} reads width {delta.shape[1]}, {concept.family.title} has {width}"
            )


def check_concept(concept: Concept) -> None:
    """Raises ValueError unless a concept that was put together of somebody's tensors is of its
    family: finite matrices of the right widths. `read_concept` has checked as much.
    """
    for layer, delta in concept.deltas.items():
        for name, tensor in delta.tensors().items():
            if name != "alpha":
                _check_matrix(f"{layer}.{name}", tensor)
    for token in concept.tokens:
        for encoder, width in concept.family.text_encoders.items():
            _check_matrix(f"{token.name}, {encoder}", token.embeddings[encoder], width)
    _check_widths(concept)
