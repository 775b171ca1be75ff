"""What a user is told before it matters: words that a CLIP does not know, and concepts that were
made with another CLIP or at another clip skip.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.file import read_concept, write_concept
from custom_diffusion.merge.merging import merge_concepts
from support.comfy_server import ComfyServer
from support.graphs import Graph, draw, node
from support.made_concepts import made_concept
from support.websocket import watch

LAYER = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
_TEXT = 3  # of ComfyUI's binary messages: a text that a node shows


def texts_on_nodes(server: ComfyServer, graph: Graph) -> dict[str, str]:
    """Node → what it shows, of everything that the server says while it executes a graph."""

    def queue(client: str) -> Any:
        return server.post("/prompt", {"prompt": graph, "client_id": client})

    shown = {}
    for message in watch(server, queue):
        if isinstance(message, bytes) and struct.unpack(">I", message[:4])[0] == _TEXT:
            (length,) = struct.unpack(">I", message[4:8])
            shown[message[8 : 8 + length].decode()] = message[8 + length :].decode()
    return shown


def prompts(applied: bool, **texts: str) -> Graph:
    """A node for each text, of a CLIP with a concept or without."""
    graph: Graph = {"checkpoint": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")}
    source = "checkpoint"
    if applied:
        source = "applied"
        graph["concept"] = node(
            "LoadConcept", concept_name="words.safetensors", rename_token="", class_noun=""
        )
        graph["applied"] = node(
            "ApplyKVDelta",
            model=["checkpoint", 0],
            clip=["checkpoint", 1],
            concept=["concept", 0],
            strength=1.0,
        )
    for name, text in texts.items():
        graph[name] = node("CLIPTextEncode", clip=[source, 1], text=text)
        graph[f"{name}-shown"] = node("PreviewAny", source=[name, 0])
    return graph


@pytest.fixture(scope="module")
def words(server: ComfyServer) -> None:
    folder = server.models / "custom_diffusion"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "words.safetensors"
    if not file.exists():
        write_concept(made_concept({LAYER: (320, 768)}), file)


@pytest.mark.usefixtures("words")
def test_words_that_the_clip_does_not_know_are_told_of_on_the_node(server: ComfyServer) -> None:
    shown = texts_on_nodes(
        server,
        prompts(
            True,
            right="a <new1> cat",
            shouted="a <NEW1> cat",
            missing="(a <new1> cat:1.2) and a <dog-2>",
        ),
    )
    assert shown.keys() == {"shouted", "missing"}
    assert shown["shouted"].startswith("<NEW1> is no word of this CLIP, which knows <new1>")
    assert shown["shouted"].endswith("Write <new1>.")
    assert shown["missing"].startswith("<dog-2> is no word of this CLIP")
    assert shown["missing"].endswith("Apply the concept that has it.")


def test_prompts_without_a_concept_are_told_of(server: ComfyServer) -> None:
    graph = prompts(False, bare="a <new1> cat", plain="a cat, 3 < 4 > 2", linked="")
    graph["string"] = node("PrimitiveString", value="a <cat> here")
    graph["linked"]["inputs"]["text"] = ["string", 0]
    shown = texts_on_nodes(server, graph)
    assert shown.keys() == {"bare", "linked"}
    assert shown["bare"].startswith("<new1>: no concept is applied to the CLIP of this prompt")
    assert "<cat>" in shown["linked"]


@pytest.mark.usefixtures("words")
def test_a_routed_concept_that_no_prompt_names_is_told_of_on_its_node(server: ComfyServer) -> None:
    """And a prompt of a CLIP that hooks or regions have taught is fine."""
    graph = draw("a dog")
    models = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1]}
    graph["concept"] = node(
        "LoadConcept", concept_name="words.safetensors", rename_token="", class_noun=""
    )
    one = {"concepts": "1", "concepts.concept_1": ["concept", 0], "concepts.strength_1": 1.0}
    graph["routed"] = node("RouteConcepts", **models, **one)
    for name in ("positive", "negative"):
        graph[name]["inputs"]["clip"] = ["routed", 1]
    graph["sampler"]["inputs"]["model"] = ["routed", 0]
    graph["hooks"] = node("CreateHookConcept", **models, concept=["concept", 0], strength=1.0)
    graph["hooked"] = node("CLIPTextEncode", clip=["hooks", 0], text="a <new1> cat")
    graph["shown"] = node("PreviewAny", source=["hooked", 0])
    shown = texts_on_nodes(server, graph)
    assert shown.keys() == {"routed"}
    assert shown["routed"].startswith("No prompt has the words of <new1> cat")


# Concepts of another text encoder


def merged(clip: Any) -> Concept:
    from custom_diffusion.host.comfyui.models.text import text_encoder

    concepts = [
        made_concept({LAYER: (320, 768)}),
        made_concept({LAYER: (320, 768)}, "<new2>", "dog", seed=1),
    ]
    captions = [f"a {noun} in a {place}" for noun in ("cat", "dog") for place in ("box", "lake")]
    with torch.inference_mode():
        return merge_concepts(concepts, text_encoder(clip), captions=captions)[0]


def remarks(clip: Any, concept: Concept) -> list[str]:
    from custom_diffusion.host.comfyui.apply import text_remarks

    with torch.inference_mode():
        return text_remarks(clip, [concept])


def test_a_merge_says_when_it_is_applied_at_another_clip_skip(
    sd15: Any, comfy: Any, tmp_path: Path
) -> None:
    concept = read_concept(write_concept(merged(sd15.clip), tmp_path / "merged.safetensors"))
    assert remarks(sd15.clip, concept) == []
    skipped = sd15.clip.clone()
    skipped.clip_layer(-2)
    (remark,) = remarks(skipped, concept)
    assert "another text encoder, or at another clip skip" in remark
    assert "CLIP Set Last Layer" in remark
    assert remarks(skipped, merged(skipped)) == []
    (remark,) = remarks(sd15.clip, merged(skipped))
    assert remarks(skipped, made_concept({LAYER: (320, 768)})) == []  # it does not remember


def test_a_merge_says_when_it_is_applied_with_another_text_encoder(sd15: Any) -> None:
    """A LoRA on the CLIP makes it another one."""
    concept = merged(sd15.clip)
    changed = sd15.clip.clone()
    key = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    weight = sd15.clip.cond_stage_model.state_dict()[key]
    changed.add_patches({key: (torch.randn(weight.shape) * weight.std(),)})
    assert len(remarks(changed, concept)) == 1
    assert remarks(sd15.clip, concept) == []
