"""Edit Concepts on ComfyUI's own MODEL and CLIP: its text encoder and its patches are judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.file import write_concept
from custom_diffusion.merge.captions import regularization_captions
from custom_diffusion.merge.editing import edit_again
from custom_diffusion.merge.edits import Edit
from custom_diffusion.merge.key_lock import lock_keys
from support.comfy_server import ComfyPromptError, ComfyServer
from support.comfy_xl import comfy_xl_clip, comfy_xl_model
from support.graphs import Graph, draw, node
from support.made_concepts import made_concept
from torch import Tensor

CAPTIONS = regularization_captions(20, seed=3)
EDITS = (Edit("cat", "dog"), Edit("old car", "bird"))


def edited(model: Any, clip: Any, *edits: Edit, **more: Any) -> Concept:
    from custom_diffusion.host.comfyui.models.text import text_encoder
    from custom_diffusion.host.comfyui.models.weights import base_model

    with torch.inference_mode():
        weights, encoder = base_model(model).weights, text_encoder(clip)
        return edit_again(None, weights, encoder, edits, captions=CAPTIONS, **more)[0]


def applied(model: Any, clip: Any, concept: Concept, strength: float = 1.0) -> Any:
    from custom_diffusion.host.comfyui.apply import apply_concept

    with torch.inference_mode():
        return apply_concept(model, clip, concept, strength)[0]


def projections(model: Any) -> dict[str, Tensor]:
    from custom_diffusion.host.comfyui.models.weights import base_model

    found = base_model(model).weights.items()
    return {name: weight.float() for name, weight in found if name.endswith(("to_k", "to_v"))}


def last_word(clip: Any, prompt: str, words: int) -> Tensor:
    """What ComfyUI's own encoder makes of a prompt's last word, (d,)."""
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(prompt))[0, words].float().clone()


@pytest.fixture(scope="module")
def made(sd15: Any) -> Concept:
    return edited(sd15.model, sd15.clip, *EDITS, preserved=["tree"])


def check_edit(model: Any, clip: Any, made: Concept) -> None:
    """A cat has keys and values of a dog, and a tree is as it was."""
    base = projections(model)
    by_us = projections(applied(model, clip, made))
    pairs = (("photo of a cat", "photo of a dog", 4), ("photo of a old car", "photo of a bird", 5))
    for edit, target, words in pairs:
        c, v = last_word(clip, edit, words), last_word(clip, target, 4)
        for name, weight in by_us.items():
            wanted = base[name] @ v
            assert (weight @ c - wanted).norm() < 0.02 * (base[name] @ (v - c)).norm(), name
    tree = last_word(clip, "photo of a tree", 4)
    for name, weight in by_us.items():
        assert ((weight - base[name]) @ tree).norm() < 1e-2 * (base[name] @ tree).norm(), name


def test_words_of_sd15(sd15: Any, made: Concept) -> None:
    check_edit(sd15.model, sd15.clip, made)


def test_words_of_sdxl(comfy: Any, embeddings_folder: Path) -> None:
    model, clip = comfy_xl_model(comfy), comfy_xl_clip(comfy, [str(embeddings_folder)])
    check_edit(model, clip, edited(model, clip, *EDITS, preserved=["tree"]))


def test_strength_0_and_a_restored_edit_are_the_base_to_the_bit(sd15: Any, made: Concept) -> None:
    from custom_diffusion.host.comfyui.models.text import text_encoder
    from custom_diffusion.host.comfyui.models.weights import base_model

    assert applied(sd15.model, sd15.clip, made, 0.0) is sd15.model
    with torch.inference_mode():
        weights, encoder = base_model(sd15.model).weights, text_encoder(sd15.clip)
        given_back = {"cat": 1.0, "old car": 1.0}
        nothing, _ = edit_again(made, weights, encoder, [], restore=given_back)
    base, by_us = projections(sd15.model), projections(applied(sd15.model, sd15.clip, nothing))
    assert all(torch.equal(weight, by_us[name]) for name, weight in base.items())


def test_locked_keys_are_those_of_the_class_noun(sd15: Any, shapes: Any) -> None:
    from custom_diffusion.host.comfyui.apply import apply_concept
    from custom_diffusion.host.comfyui.models.text import text_encoder
    from custom_diffusion.host.comfyui.models.weights import base_model

    concept = made_concept(shapes, "<new1>", "cat", seed=1)
    with torch.inference_mode():
        weights, encoder = base_model(sd15.model).weights, text_encoder(sd15.clip)
        locked, _ = lock_keys(concept, weights, encoder, captions=CAPTIONS)
        model, clip = apply_concept(sd15.model, sd15.clip, locked, 1.0)
    base, by_us = projections(sd15.model), projections(model)
    own, noun = (
        last_word(clip, "photo of a <new1> cat", 4),
        last_word(sd15.clip, "photo of a cat", 4),
    )
    for name in (name for name in base if name.endswith("to_k")):
        wanted = base[name] @ noun
        assert (by_us[name] @ own - wanted).norm() < 0.02 * (base[name] @ (own - noun)).norm()


def test_in_a_workflow(server: ComfyServer, shapes: Any) -> None:
    folder = server.models / "custom_diffusion"
    folder.mkdir(parents=True, exist_ok=True)
    write_concept(made_concept(shapes, "<new1>", "cat"), folder / "unlocked.safetensors")
    (server.input / "edit captions.txt").write_text("\n".join(CAPTIONS))
    models = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1]}
    shared = {**models, "preserve": "tree", "softness": 0.0}
    shared["regularization_captions"] = "edit captions.txt"

    def edit(words: str, operation: str, **more: Any) -> Any:
        return node("EditConcepts", words=words, operation=operation, **shared, **more)

    graph: Graph = draw("photo of a cat")
    graph["first"] = edit("cat", "erase")
    chosen = {"operation.into": "bird"}
    graph["second"] = edit("dog, horse", "replace", earlier_edit=["first", 0], **chosen)
    graph["applied"] = node("ApplyKVDelta", **models, concept=["second", 0], strength=1.0)
    graph["sampler"]["inputs"]["model"] = ["applied", 0]
    graph["load"] = node("LoadConcept", concept_name="unlocked.safetensors", rename_token="")
    captions = {"regularization_captions": "edit captions.txt"}
    graph["locked"] = node("LockConceptKeys", **models, concept=["load", 0], **captions)
    graph["inspect"] = node("InspectConcept", concept=["locked", 0])
    entry = server.run(graph)
    assert "look where its class noun looks" in entry["outputs"]["locked"]["text"][0]
    del graph["locked"], graph["inspect"]
    told = entry["outputs"]["second"]["text"][0]
    assert "'cat' erased" in told and "'horse' replaced by 'bird'" in told
    edited_picture = server.images(entry, "image")[0]
    back = {"operation.amount": 1.0}
    graph["back"] = edit("cat, dog, horse", "restore", earlier_edit=["second", 0], **back)
    graph["applied"]["inputs"]["concept"] = ["back", 0]
    restored = server.images(server.run(graph), "image")[0]
    plain = server.images(server.run(draw("photo of a cat")), "image")[0]
    assert (restored == plain).all() and (edited_picture != plain).any()
    del graph["back"]["inputs"]["earlier_edit"]
    with pytest.raises(ComfyPromptError, match="cannot be restored: no earlier edit"):
        server.run(graph)
