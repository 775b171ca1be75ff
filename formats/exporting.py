"""A concept as the files of other tools."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from ..concept.atomic import write_atomically
from ..concept.concept import Concept, ModifierToken
from ..concept.delta import LowRankDelta
from ..concept.errors import ConceptFileError, IncompatibleModelError
from ..concept.file import delta_tensors
from ..concept.fit import check_fit, check_weight_patches
from ..concept.layers import is_projection, layer_to_diffusers
from ..concept.tensors import read_header
from .base import BaseModel, read_cross_attention
from .content import ENDINGS
from .names import hugging_face_name, kohya_name, layer_of

File = tuple[str, Any, dict[str, str] | None]
"""What is added to the stem of the path, what is written, and the header of a .safetensors; None
for a PyTorch archive"""


Tensors = Mapping[str, Tensor]
"""The base model's weights by layer; empty where none were given"""


@dataclass(frozen=True)
class Format:
    """A kind of file that a concept can be exported to."""

    title: str
    files: Callable[[Concept, Tensors], list[File]]
    needs_base: bool = False
    """Because it holds whole matrices"""
    needs_low_rank: bool = False


def export_concept(
    concept: Concept,
    path: Path,
    kind: str,
    base: BaseModel | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    number_if_taken: bool = False,
) -> list[Path]:
    """Writes the concept as a format of `FORMATS`, and says which files there are now.

    `path` names the first; its ending is that of the format. Each file is complete or absent, and
    none is replaced: a name that is taken is an error, or gets a number. `dtype` is that of changes
    and embeddings; where whole matrices are written, all is float32.
    Raises ConceptFileError, and IncompatibleModelError where the base is another.
    """
    check_weight_patches(concept)
    chosen = FORMATS[kind]
    if chosen.needs_low_rank and any(d.factors is None for d in concept.deltas.values()):
        raise ConceptFileError(
            f"{chosen.title} holds factors only, and this concept is dense: {concept.describe()}. "
            f"Compress it first (--rank, or CompressConcept)."
        )
    if chosen.needs_base and base is None:
        raise ConceptFileError(
            f"{chosen.title} holds whole weights, so the base model is needed: connect its MODEL, "
            f"or give --base."
        )
    weights: Tensors = {}
    if base is not None:
        check_fit(concept, base.family, {k: tuple(w.shape) for k, w in base.weights.items()})
        if concept.base_hash and concept.base_hash != base.hash:
            raise IncompatibleModelError(
                f"The concept {concept.describe()} was trained on another checkpoint (base hash "
                f"{concept.base_hash[:8]}) than the base given ({base.hash[:8]}). Give that one, "
                f"or whole weights would mix the two."
            )
        weights = base.weights
    files = chosen.files(concept if chosen.needs_base else concept.to(dtype), weights)
    if not files:
        raise ConceptFileError(f"There is nothing in {concept.describe()} for {chosen.title}.")
    stem = str(path.with_suffix("")) if path.suffix in ENDINGS else str(path)
    for number in itertools.count(1):
        numbered = stem if number == 1 else f"{stem}-{number}"
        targets = [Path(f"{numbered}{extra}") for extra, _, _ in files]
        taken = next((target for target in targets if target.exists()), None)
        if taken is None:
            break
        if not number_if_taken:
            raise ConceptFileError(f"{taken} exists already. Choose another name, or move it.")
    for target, (_, value, header) in zip(targets, files, strict=True):
        _write(target, value, header)
    return targets


def bake(concept: Concept, model_file: Path, path: Path) -> list[str]:
    """Writes a checkpoint, or a UNet of diffusers, with the concept in its weights.

    Returns the tokens, which a checkpoint has no place for: export them as embeddings. Reads and
    writes .safetensors, keeps every other byte. Raises ConceptFileError, and IncompatibleModelError
    where layers or shapes differ.
    """
    check_weight_patches(concept)
    weights = read_cross_attention(model_file)
    base = BaseModel.of(weights.items())
    names = {layer_of(name.removesuffix(".weight")): name for name in weights}
    check_fit(concept, base.family, {k: tuple(w.shape) for k, w in base.weights.items()})
    if path.exists():
        raise ConceptFileError(f"{path} exists already. Choose another name, or move it.")
    header = read_header(model_file)

    def write(temporary: Path) -> None:
        """A copy with other bytes where the concept changes it: nothing else has to be read."""
        shutil.copyfile(model_file, temporary)
        with open(temporary, "r+b") as file:
            for layer, delta in concept.deltas.items():
                weight = weights[names[layer]]
                changed = (weight.float() + delta.dense().float()).to(weight.dtype).contiguous()
                file.seek(header.tensors[names[layer]].start)
                file.write(changed.view(torch.uint8).numpy().data)

    write_atomically(path, write, header.file_bytes, replace=False)
    return [token.name for token in concept.tokens]


def _comfyui_lora(concept: Concept, _base: Tensors) -> list[File]:
    tensors = delta_tensors(concept)
    return [(".safetensors", tensors, {})] if tensors else []


def _kohya_lora(concept: Concept, _base: Tensors) -> list[File]:
    """A1111, Forge, InvokeAI, diffusers and ComfyUI read it; dense changes as `.diff`, as LyCORIS
    does.

    One alpha stands for all layers, that of the most common rank, and factors of another rank are
    larger or smaller instead: diffusers takes one layer's alpha for all.
    """
    original = concept.family.name == "sdxl"
    ranks = Counter(d.rank for d in concept.deltas.values() if d.rank is not None)
    alpha = max(ranks, key=lambda rank: (ranks[rank], rank), default=1)
    tensors: dict[str, Tensor] = {}
    for layer, delta in concept.deltas.items():
        name = kohya_name(layer, diffusers_blocks=not original)
        parts = delta.tensors()
        if (factors := delta.factors) is not None:
            if factors.rank != alpha:
                parts = factors.scaled(factors.rank / alpha).to(factors.up.dtype).tensors()
            parts["alpha"] = torch.tensor(float(alpha))
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return [(".safetensors", tensors, {"ss_network_module": "networks.lora"})] if tensors else []


def _diffusers_lora(concept: Concept, _base: Tensors) -> list[File]:
    """For `pipeline.load_lora_weights`: PEFT's names. Without an alpha its scale is one, but before
    diffusers 0.42 only where all ranks are the same: smaller ones are filled up with zeros.
    """
    tensors = {}
    deltas = _factors(concept)
    rank = max((delta.rank for delta in deltas.values()), default=0)
    for layer, delta in deltas.items():
        path, missing = f"unet.{layer_to_diffusers(layer)}", rank - delta.rank
        tensors[f"{path}.lora_A.weight"] = functional.pad(delta.down, (0, 0, 0, missing))
        tensors[f"{path}.lora_B.weight"] = functional.pad(delta.up, (0, missing))
    return [(".safetensors", tensors, {"format": "pt"})] if tensors else []


def _embeddings(concept: Concept, _base: Tensors) -> list[File]:
    """A file for each token, for `models/embeddings` and `load_textual_inversion`."""
    files: list[File] = []
    for token in concept.tokens:
        extra = f"-{token.name.strip('<>')}" if len(concept.tokens) > 1 else ""
        several = len(token.embeddings) > 1
        tensors = dict(token.embeddings) if several else {token.name: _only(token)}
        files.append((f"{extra}.safetensors", tensors, {}))
    return files


def _compvis(concept: Concept, base: Tensors) -> list[File]:
    state: dict[str, Any] = {
        f"model.diffusion_model.{layer}.weight": weight
        for layer, weight in _whole(concept, base).items()
    }
    if concept.tokens:
        state["embed"] = torch.cat([_only(token) for token in concept.tokens]).float()
    return [(".ckpt", {"state_dict": state}, None)]


def _adobe(concept: Concept, base: Tensors) -> list[File]:
    unet = {
        f"{layer_to_diffusers(layer)}.weight": weight
        for layer, weight in _whole(concept, base).items()
    }
    return [(".bin", {"unet": unet, "modifier_token": _adobe_words(concept)}, None)]


def _adobe_compressed(concept: Concept, _base: Tensors) -> list[File]:
    unet = {
        f"{layer_to_diffusers(layer)}.weight": {"u": delta.up.float(), "v": delta.down.float()}
        for layer, delta in _factors(concept).items()
    }
    return [(".bin", {"unet": unet, "modifier_token": _adobe_words(concept)}, None)]


def _hugging_face(concept: Concept, base: Tensors) -> list[File]:
    """For `unet.load_attn_procs(…, _pipeline=pipeline)`, and `load_textual_inversion` for words."""
    processors: dict[str, Any] = {}
    for layer, weight in _whole(concept, base).items():
        name = hugging_face_name(layer)
        # It counts processors, so that those of self-attention must be there, empty.
        processors[f"{name.split('.attn2.')[0]}.attn1.processor"] = {}
        processors[f"{name}.weight"] = weight
    words: list[File] = [  # without the brackets that Windows does not allow
        (f"/{token.name.strip('<>')}.bin", {token.name: _only(token).float().squeeze(0)}, None)
        for token in concept.tokens
    ]
    return [("/pytorch_custom_diffusion_weights.bin", processors, None), *words]


def _a1111_delta(concept: Concept, _base: Tensors) -> list[File]:
    entries, tensors = {}, {}
    for layer, delta in concept.deltas.items():
        name = f"model.diffusion_model.{layer}.weight"
        if (factors := delta.factors) is None:
            entries[name] = "delta"
            tensors[name] = delta.dense()
        else:
            entries[name] = "delta_factors"
            tensors[f"{name}.US"], tensors[f"{name}.Vh"] = factors.up, factors.down
    header = {"json": json.dumps({"meta": {"version": "0.2.0"}, "entries": entries})}
    return [(".safetensors", tensors, header)] if tensors else []


FORMATS: Mapping[str, Format] = {
    "comfyui-lora": Format("A LoRA with ComfyUI's names", _comfyui_lora),
    "kohya-lora": Format("A LoRA with kohya's names", _kohya_lora),
    "diffusers-lora": Format("A LoRA for diffusers", _diffusers_lora, needs_low_rank=True),
    "embeddings": Format("Textual-inversion embeddings", _embeddings),
    "hugging-face": Format("Hugging Face's Custom Diffusion", _hugging_face, needs_base=True),
    "compvis": Format("A delta of the original code", _compvis, needs_base=True),
    "adobe": Format("Adobe's delta.bin", _adobe, needs_base=True),
    "adobe-compressed": Format(
        "Adobe's compressed delta.bin", _adobe_compressed, needs_low_rank=True
    ),
    "a1111-delta": Format("A delta for A1111's extension", _a1111_delta),
}
"""By the name that the command line and the node offer."""


def _factors(concept: Concept) -> dict[str, LowRankDelta]:
    """By layer; all of a concept that `needs_low_rank` has let pass."""
    factors = {layer: delta.factors for layer, delta in concept.deltas.items()}
    return {layer: both for layer, both in factors.items() if both is not None}


def _whole(concept: Concept, base: Tensors) -> dict[str, Tensor]:
    """Every key and value projection with the concept in it, (out, in), float32."""
    beyond = [layer for layer in concept.layers if not is_projection(layer)]
    if beyond:
        raise ConceptFileError(
            f"The concept changes more than keys and values ({beyond[0]} for one), which this "
            f"format has no place for. Export it as a LoRA."
        )
    changes = {k: d.dense().float() for k, d in concept.deltas.items()}
    return {
        layer: weight.detach().cpu().float() + changes.get(layer, 0.0)
        for layer, weight in base.items()
        if is_projection(layer)
    }


def _adobe_words(concept: Concept) -> dict[str, Any]:
    """A row for each word; for SDXL a row for each of its text encoders."""
    words: dict[str, Any] = {}
    for token in concept.tokens:
        rows = [_row(token, name).float() for name in token.embeddings]
        words[token.name] = rows if len(rows) > 1 else rows[0]
    return words


def _only(token: ModifierToken) -> Tensor:
    """The embedding for the one text encoder, (vectors, width)."""
    if len(token.embeddings) != 1:
        raise ConceptFileError(
            f"{token.name} has embeddings for {len(token.embeddings)} text encoders, and this "
            f"format has room for one. Choose a format that SDXL has."
        )
    return next(iter(token.embeddings.values()))


def _row(token: ModifierToken, encoder: str) -> Tensor:
    rows = token.embeddings[encoder]
    if len(rows) != 1:
        raise ConceptFileError(
            f"{token.name} has {len(rows)} vectors, and this format has room for one. Export it as "
            f"a LoRA and embeddings."
        )
    return rows[0]


def _write(path: Path, value: Any, header: dict[str, str] | None) -> None:
    """A .safetensors where there is a header, else a PyTorch archive."""
    if header is None:
        write_atomically(path, lambda temporary: torch.save(value, temporary), replace=False)
        return
    # Copies: the layers of a merged concept share a factor, which safetensors refuses to write.
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in value.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_atomically(path, lambda t: save_file(tensors, t, header), size, replace=False)
