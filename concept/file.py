"""The concept file: one `.safetensors` that this pack reads whole and stock LoRA loaders can apply.

docs/concept-format.md describes it for other tools. Reading never unpickles.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .atomic import BeforeNaming, nothing, write_atomically
from .checks import check_concept, check_sizes
from .concept import Concept, ModifierToken
from .delta import PARTS, Delta, delta_of, shape_of
from .errors import ConceptFileError, CustomDiffusionError
from .header import ConceptHeader, damage, metadata_of
from .layers import is_cross_attention
from .naming import write_new
from .tensors import at_least_half, read_header, read_tensors

_WEIGHT_PREFIX = "diffusion_model."
_EMBEDDING_PREFIX = "bundle_emb."
_SINGLE_ENCODER_SUFFIX = "string_to_param.*"


def write_concept(
    concept: Concept,
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float16,
    *,
    replace: bool = True,
    before_naming: BeforeNaming = nothing,
) -> Path:
    """Writes the concept, in half precision unless asked otherwise; the file is complete or absent.

    Raises ConceptFileError when the disk is full or the folder cannot be written, and for words
    that no file holds: what is written here can be read again.
    """
    path = Path(path)
    metadata = metadata_of(concept, path.stem)
    ConceptHeader.of(path, metadata)
    # Copies: the layers of a merged concept share their `down`, which safetensors refuses to write.
    tensors = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in concept_tensors(concept.to(dtype)).items()
    }
    write_atomically(
        path,
        lambda temporary: save_file(tensors, temporary, metadata),
        expected_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        replace=replace,
        before_naming=before_naming,
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
    """Reads a concept file into memory of its own. Raises ConceptFileError saying what is wrong
    with it.
    """
    path = Path(path)
    # Of a file that is no concept of ours nothing but the header is read.
    ConceptHeader.of(path, read_header(path).metadata)
    return concept_of(path, *read_tensors(path, _is_ours))


def concept_of(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Concept:
    """The concept in what was read from `path`. Raises ConceptFileError."""
    header = ConceptHeader.of(path, metadata)
    tensors = at_least_half(tensors)
    try:
        concept = Concept(
            family=header.family,
            deltas=_deltas(tensors),
            tokens=_tokens(tensors, header),
            base_hash=header.base_hash,
            constraint_prompts=header.constraint_prompts,
            provenance=header.provenance,
            scope=header.scope,
        )
        check_concept(concept)
        return concept
    except CustomDiffusionError as error:
        raise ConceptFileError(f"{path.name}: {error}") from error
    except (ValueError, RuntimeError) as error:
        raise damage(path, error) from error


def concept_tensors(concept: Concept) -> dict[str, Tensor]:
    """The tensors of the file, under the names that stock LoRA and embedding loaders read."""
    return {**delta_tensors(concept), **embedding_tensors(concept)}


def delta_tensors(concept: Concept) -> dict[str, Tensor]:
    """Those of what it changes in the UNet."""
    return {
        f"{_WEIGHT_PREFIX}{layer}.{name}": tensor
        for layer in concept.layers
        for name, tensor in concept.deltas[layer].tensors().items()
    }


def embedding_tensors(concept: Concept) -> dict[str, Tensor]:
    """Those of its words."""
    return {
        _embedding_key(token.name, encoder, len(token.embeddings)): embedding
        for token in concept.tokens
        for encoder, embedding in token.embeddings.items()
    }


def _embedding_key(token: str, encoder: str, encoders: int) -> str:
    return f"{_EMBEDDING_PREFIX}{token}.{encoder if encoders > 1 else _SINGLE_ENCODER_SUFFIX}"


def _is_ours(name: str) -> bool:
    return name.startswith((_WEIGHT_PREFIX, _EMBEDDING_PREFIX))


def _deltas(tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(_WEIGHT_PREFIX):
            path = key.removeprefix(_WEIGHT_PREFIX)
            part = next((part for part in PARTS if path.endswith(f".{part}")), "")
            layers.setdefault(path.removesuffix(f".{part}"), {})[part] = tensor
    check_sizes({layer: shape_of(parts) for layer, parts in layers.items()})
    for layer in layers:
        if not is_cross_attention(layer):
            raise ValueError(f"{layer} is no matrix of a cross-attention layer")
    return {layer: delta_of(layer, parts) for layer, parts in layers.items()}


def _tokens(tensors: Mapping[str, Tensor], header: ConceptHeader) -> tuple[ModifierToken, ...]:
    tokens = []
    for word in header.words:
        embeddings = {}
        for encoder in header.family.text_encoders:
            key = _embedding_key(word.name, encoder, len(header.family.text_encoders))
            if key not in tensors:
                raise ValueError(f"{key} is missing")
            embeddings[encoder] = torch.atleast_2d(tensors[key])
        tokens.append(ModifierToken(word.name, word.class_noun, embeddings, word.initializer))
    return tuple(tokens)
