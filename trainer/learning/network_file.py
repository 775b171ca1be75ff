"""A whole UNet on disk: what a method learnt that fits no concept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ...concept.atomic import BeforeNaming, nothing, write_atomically
from ...concept.concept import Concept
from ...diffusion.protocols import Denoiser


def fold_in(denoiser: Denoiser, concept: Concept) -> Concept:
    """Adds the concept's deltas to the denoiser's network, for good; returns the words alone."""
    with torch.no_grad():
        for layer, delta in concept.deltas.items():
            weight = denoiser.network.get_parameter(f"{denoiser.projections[layer]}.weight")
            weight.add_(delta.dense().to(weight))
    return replace(concept, deltas={})


def write_network(
    network: nn.Module,
    path: Path,
    *,
    replace: bool = False,
    before_naming: BeforeNaming = nothing,
) -> Path:
    """Writes a UNet in half precision under its own names, as ComfyUI and diffusers load one.

    Raises ConceptFileError when it cannot be written and FileExistsError when the path is taken and
    must not be replaced.
    """
    tensors = {
        name: tensor.detach().to("cpu", torch.float16).contiguous()
        for name, tensor in network.state_dict().items()
    }
    size = sum(2 * tensor.numel() for tensor in tensors.values())
    write_atomically(
        path,
        lambda temporary: save_file(tensors, temporary),
        size,
        replace=replace,
        before_naming=before_naming,
    )
    return path
