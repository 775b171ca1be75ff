"""A whole UNet on disk: what a method learnt that fits no concept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..concept.atomic import write_atomically
from ..concept.concept import Concept
from .protocols import Denoiser


def write_network(denoiser: Denoiser, concept: Concept, path: Path) -> Concept:
    """Adds the concept's deltas to the denoiser's network for good and writes the network.

    The file holds the network's own names and half precision: a UNet, as ComfyUI loads one. Returns
    what is left of the concept, its words, with the file's name in the provenance. Raises
    ConceptFileError when it cannot be written.
    """
    with torch.no_grad():
        for layer, delta in concept.deltas.items():
            weight = denoiser.network.get_parameter(f"{denoiser.projections[layer]}.weight")
            weight += delta.dense().to(weight)
    tensors = {
        name: tensor.detach().to("cpu", torch.float16).contiguous()
        for name, tensor in denoiser.network.state_dict().items()
    }
    size = sum(2 * tensor.numel() for tensor in tensors.values())
    write_atomically(path, lambda temporary: save_file(tensors, temporary), size, replace=False)
    provenance = {**concept.provenance, "network_file": path.name}
    return replace(concept, deltas={}, provenance=provenance)
