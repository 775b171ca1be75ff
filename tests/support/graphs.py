"""Prompt graphs in the form of ComfyUI's HTTP API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Graph = dict[str, dict[str, Any]]
_METHOD_INPUTS = {name: f"method.{name}" for name in ("steps", "learning_rate", "rank")}


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def draw_pictures(folder: Path, count: int = 3, seed: int = 0) -> None:
    """Pictures of noise, not square, in PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        pixels = rng.integers(0, 255, (96, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


def teach(
    key: str, folder: str, noun: str, token: str, regularization: str = "none", **settings: Any
) -> Graph:
    """Nodes `key-data` and `key` that teach one concept, as small as a real training can be.

    Without augmentation and flips a picture is encoded once, with both 16 times. A picture and a
    sample of a step take half a second of a core each; half a batch is regularization.
    """
    options = {
        "name": key,
        "method": "custom diffusion",
        "method.steps": 2,
        "method.learning_rate": 1e-3,
        "batch_size": 1 if regularization == "none" else 2,
        "resolution": 64,
        "seed": 0,
        "wait": True,
        "augment": False,
        "flip": False,
        "fit": "crop",
        "prior_weight": 1.0,
        "gradient_cut": "start",
        "micro_batch_size": 0,
        "gradient_checkpointing": False,
        "preview_every_steps": 0,
        "checkpoint_every_steps": 50,
        "share_device": False,
        "keep_on_interrupt": False,
        "keep_best": 1,
        **{_METHOD_INPUTS.get(name, name): value for name, value in settings.items()},
    }
    models = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "vae": ["checkpoint", 2]}
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"),
        f"{key}-data": node(
            "CustomDiffusionConcept",
            folder=folder,
            class_noun=noun,
            modifier_token=token,
            regularization_folder=regularization,
            initializer="",
            kind="thing",
        ),
        key: node(
            "CustomDiffusionTrain",
            **{**models, "concepts.concept0": [f"{key}-data", 0], **options},
        ),
    }


def merge(*concepts: list[Any], strengths: tuple[float, ...] = (1.0, 1.0)) -> dict[str, Any]:
    pairs = enumerate(zip(concepts, strengths, strict=True), start=1)
    inputs: dict[str, Any] = {"concepts": str(len(concepts))}
    for number, (concept, strength) in pairs:
        inputs[f"concepts.concept_{number}"] = concept
        inputs[f"concepts.strength_{number}"] = strength
    return node(
        "ConceptMerge",
        clip=["checkpoint", 1],
        regularization_captions="captions.txt",
        relative_ridge=1e-4,
        **inputs,
    )


def draw(text: str, concept: list[Any] | None = None, strength: float = 1.0) -> Graph:
    """A picture of a prompt, with a concept applied or without; its node is `image`."""
    source = "checkpoint" if concept is None else "applied"
    graph = {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"),
        "positive": node("CLIPTextEncode", clip=[source, 1], text=text),
        "negative": node("CLIPTextEncode", clip=[source, 1], text=""),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sampler": node(
            "KSampler",
            model=[source, 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            seed=7,
            steps=2,
            cfg=5.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "pixels": node("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2]),
        "image": node("SaveImage", images=["pixels", 0], filename_prefix="picture"),
    }
    if concept is not None:
        graph["applied"] = node(
            "ApplyKVDelta",
            model=["checkpoint", 0],
            clip=["checkpoint", 1],
            concept=concept,
            strength=strength,
        )
    return graph
