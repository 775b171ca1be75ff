"""LoRA and LyCORIS files, of which a concept takes what changes cross-attention."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..concept.checks import check_sizes
from ..concept.layers import MOST_LAYERS
from .content import Content, container, tensors_of
from .found import Found
from .modules import (
    Scale,
    check_floats,
    flattened,
    made_shape,
    read_delta,
    read_relative,
    split_name,
)
from .names import layer_of
from .peft import peft_scale

_BUNDLED = "bundle_emb."
# A word may have dots in it, so its end is known by what can follow.
_BUNDLED_PART = re.compile(r"(.+)\.(string_to_param\.\*|emb_params|clip_[lgh](?:_out)?)", re.S)
_TEXT_ENCODER = re.compile(r"lora_te\d?_|text_encoder|te\d?[._]|clip_[lgh][._]|text_model")


@dataclass
class _Sorted:
    """A file's tensors by what they belong to."""

    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Module → part → tensor"""
    names: dict[str, list[str]] = field(default_factory=dict)
    """Module → names of its tensors"""
    words: dict[str, Tensor] = field(default_factory=dict)
    """Bundled with it, by their names in the file"""

    def add(self, module: str, part: str, name: str, tensor: Tensor) -> None:
        parts = self.modules.setdefault(module, {})
        if part in parts:
            raise ValueError(
                f"{module} has two tensors for {part}, as if two adapters were in the file"
            )
        parts[part] = tensor
        self.names.setdefault(module, []).append(name)


def read_lora(content: Content) -> Found | None:
    """LoRA (kohya, ComfyUI, diffusers, PEFT), LoHa, LoKr, OFT, IA3, GLoRA, DoRA of the first three,
    and plain differences.
    """
    tensors = content.tensors()
    if not any(_is_a_factor(name) for name in tensors):
        return None
    found = Found("a LoRA")
    file = _sort(tensors)
    scale = peft_scale(content)
    _take_modules(found, file, scale)
    if scale is None and any(
        module.startswith("unet.base_model.model.") for module in file.modules
    ):
        found.notes.append(
            "nothing in the file says how strong it is (PEFT's lora_alpha): 1 is taken"
        )
    _take_words(found, file.words)
    return found


def read_mix_of_show(content: Content) -> Found | None:
    """An ED-LoRA of Mix-of-Show. It has a row of each word for every layer; a concept has one."""
    params = content.part("params")
    unet, words = container(params.get("unet")), container(params.get("new_concept_embedding"))
    if not unet and not words:
        return None
    found = Found("an ED-LoRA of Mix-of-Show")
    place = "params/unet/"
    file = _sort({f"{place}{name}": tensor for name, tensor in tensors_of(unet).items()}, place)
    # Its layers multiply by alpha, not by alpha / rank, and alpha is 1 in every released file.
    _take_modules(found, file, lambda _name, _rank: 1.0)
    for name, tensor in tensors_of(words).items():
        if tensor.ndim not in (1, 2):
            raise ValueError(f"the word {name} has shape {tuple(tensor.shape)}; a matrix fits")
        matrix = tensor.reshape(-1, tensor.shape[-1]).float()
        found.add_word(name, matrix.mean(0))
        found.used.add(f"params/new_concept_embedding/{name}")
        if len(matrix) > 1:
            found.notes.append(f"{name} has a row for each of {len(matrix)} layers: their mean")
    encoder = list(container(params.get("text_encoder")))
    found.leave_out("modules of the text encoder", encoder, ["params/text_encoder"])
    return found


def _is_a_factor(name: str) -> bool:
    """Whether the name ends as those of LoRAs do, and of no other file."""
    split = split_name(name)
    return split is not None and split[1] not in ("alpha", "bias")


def _sort(tensors: Mapping[str, Tensor], place: str = "") -> _Sorted:
    """Of tensors by their paths in the file, which begin with `place`."""
    file = _Sorted()
    for path, tensor in tensors.items():
        name = path.removeprefix(place)
        if name.startswith(_BUNDLED):
            file.words[path] = tensor
            continue
        split = split_name(name)
        if split is None and name.endswith(".weight"):
            module = name.removesuffix(".weight")
            # An IA3's scales; of anything else it is a part that is not known.
            split = (module, "weight") if f"{place}{module}.on_input" in tensors else None
        module, part = split or _of_layer(name)
        file.add(module, part, path, tensor)
    return file


def _of_layer(name: str) -> tuple[str, str]:
    """(module, rest) of a name with an unknown end: the layer of cross-attention it begins with,
    else all of it.
    """
    pieces = name.split(".")
    for end in range(len(pieces) - 1, max(len(pieces) - 4, 0), -1):
        module = ".".join(pieces[:end])
        if layer_of(module):
            return module, ".".join(pieces[end:])
    return name, ""


def _take_modules(found: Found, file: _Sorted, scale: Scale | None) -> None:
    modules = _by_layer(file)
    parts = {module: flattened(file.modules[module]) for module in modules.values()}
    _check_sizes(parts)
    for layer, module in modules.items():
        if parts[module].keys() == {"bias"}:
            continue
        try:
            check_floats(parts[module])
            if relative := read_relative(module, parts[module], scale):
                found.relative[layer] = relative
            else:
                found.deltas[layer] = read_delta(module, parts[module], scale)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{module}: {error}") from error
        found.used.update(file.names[module])
    biases = [
        name
        for module in parts
        for name in file.names[module]
        if (split_name(name) or ("", ""))[1] == "bias"
    ]
    found.used.difference_update(biases)
    found.leave_out("biases, which a concept has no place for,", biases)
    _leave_out_modules(found, file, {m for m in file.modules if m not in parts})


def _by_layer(file: _Sorted) -> dict[str, str]:
    """Layer of cross-attention → module. Raises ValueError for two of one layer."""
    modules: dict[str, str] = {}
    for module in file.modules:
        layer = layer_of(module)
        if layer in modules:
            raise ValueError(
                f"it changes one matrix under two names, {modules[layer]} and {module}, and "
                f"nothing says which of them counts"
            )
        if layer:
            modules[layer] = module
    if len(modules) > MOST_LAYERS:
        raise ValueError(
            f"it changes {len(modules)} matrices, more than any model that takes concepts has "
            f"({MOST_LAYERS})"
        )
    return modules


def _check_sizes(parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Of all matrices that are to be made, first: small factors can stand for large ones."""
    sizes: dict[str, tuple[int, ...]] = {}
    for module, its_parts in parts.items():
        try:
            if shape := made_shape(its_parts):
                sizes[module] = shape
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error
    check_sizes(sizes)


def _leave_out_modules(found: Found, file: _Sorted, beyond: set[str]) -> None:
    """Notes the modules that are no cross-attention, those of text encoders by themselves."""
    ordered = [module for module in file.modules if module in beyond]
    text = [module for module in ordered if _TEXT_ENCODER.match(module)]
    others = [module for module in ordered if not _TEXT_ENCODER.match(module)]
    for what, some in (
        ("modules of text encoders", text),
        ("modules that are not cross-attention", others),
    ):
        found.leave_out(what, some, [name for module in some for name in file.names[module]])


def _take_words(found: Found, bundled: Mapping[str, Tensor]) -> None:
    """Words that lie in the file, `bundle_emb.<word>.<part>`."""
    words: dict[str, list[Tensor]] = {}
    output, strange = [], []
    for name, tensor in bundled.items():
        split = _BUNDLED_PART.fullmatch(name.removeprefix(_BUNDLED))
        if split is None:
            strange.append(name)
        elif split[2].endswith("_out"):
            output.append(name)
        else:
            words.setdefault(split[1], []).append(tensor)
            found.used.add(name)
    for word, embeddings in words.items():
        found.add_word(word, *embeddings)
    found.leave_out("vectors for a text encoder's output", output)
    found.leave_out("bundled embeddings of an unknown kind", strange)
