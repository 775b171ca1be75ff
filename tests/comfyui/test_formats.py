"""Other tools' files through ComfyUI: its LoRA loader judges what we write, and what we read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.delta import LowRankDelta
from custom_diffusion.concept.file import write_concept
from custom_diffusion.formats.exporting import export_concept
from custom_diffusion.formats.importing import open_concept
from custom_diffusion.formats.names import kohya_name
from safetensors.torch import save_file
from support.comfy_server import ComfyServer
from support.graphs import node
from support.made_concepts import made_concept

PREFIX = "diffusion_model."


def weights_with_lora(comfy: Any, loaded: Any, path: Path) -> dict[str, torch.Tensor]:
    """The UNet's weights after ComfyUI's own LoRA loader."""
    from custom_diffusion.host.comfyui.models.weights import patched_weights

    lora = comfy.utils.load_torch_file(str(path), safe_load=True)
    model, _ = comfy.sd.load_lora_for_models(loaded.model, loaded.clip, lora, 1.0, 0.0)
    return patched_weights(model, PREFIX)


def weights_with_concept(loaded: Any, concept: Concept) -> dict[str, torch.Tensor]:
    from custom_diffusion.host.comfyui.apply import apply_concept
    from custom_diffusion.host.comfyui.models.weights import patched_weights

    with torch.inference_mode():
        model, _ = apply_concept(loaded.model, loaded.clip, concept, 1.0)
    return patched_weights(model, PREFIX)


def assert_same_change(ours: Any, theirs: Any, before: Any) -> None:
    changed = {name for name in before if not torch.equal(before[name], theirs[name])}
    assert changed
    assert changed == {name for name in before if not torch.equal(before[name], ours[name])}
    for name in changed:
        change = (theirs[name] - before[name]).abs().max()
        assert (ours[name] - theirs[name]).abs().max() < 2e-3 * change


@pytest.mark.parametrize("kind", ["comfyui-lora", "kohya-lora"])
@pytest.mark.parametrize("rank", [None, 6, "mixed"], ids=["dense", "low rank", "mixed ranks"])
def test_the_stock_lora_loader_reads_what_we_export(
    comfy: Any, sd15: Any, shapes: Any, rank: int | str | None, kind: str, tmp_path: Path
) -> None:
    concept = made_concept(shapes, rank=6 if rank == "mixed" else rank)
    if rank == "mixed":
        kept = {
            layer: LowRankDelta(delta.up[:, : 1 + n % 6], delta.down[: 1 + n % 6])
            for n, (layer, delta) in enumerate(concept.deltas.items())
            if isinstance(delta, LowRankDelta)
        }
        concept = replace(concept, deltas=kept)
    (path,) = export_concept(concept, tmp_path / "cat.safetensors", kind)
    before = weights_with_concept(sd15, Concept(concept.family, {}, concept.tokens))
    assert_same_change(
        weights_with_concept(sd15, concept), weights_with_lora(comfy, sd15, path), before
    )


def test_lycoris_files_mean_to_us_what_they_mean_to_the_stock_loader(
    comfy: Any, sd15: Any, shapes: Any, tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(3)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * 0.1

    tensors: dict[str, torch.Tensor] = {}
    for number, (layer, (out, width)) in enumerate(shapes.items()):
        kinds = [
            {"hada_w1_a": numbers(out, 4), "hada_w1_b": numbers(4, width)}
            | {"hada_w2_a": numbers(out, 4), "hada_w2_b": numbers(4, width)},
            {"lokr_w1": numbers(8, 8), "lokr_w2": numbers(out // 8, width // 8)},
            {"lokr_w1": numbers(8, 8), "lokr_w2_a": numbers(out // 8, 4)}
            | {"lokr_w2_b": numbers(4, width // 8)},
            {"lokr_w1_a": numbers(8, 2), "lokr_w1_b": numbers(2, 8)}
            | {"lokr_w2_a": numbers(out // 8, 4), "lokr_w2_b": numbers(4, width // 8)},
            {"lora_up.weight": numbers(out, 4), "lora_down.weight": numbers(4, width)},
            {"diff": numbers(out, width)},
        ]
        parts = kinds[number % len(kinds)] | {"alpha": torch.tensor(2.5)}
        name = kohya_name(layer, diffusers_blocks=True)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    path = tmp_path / "lycoris.safetensors"
    save_file(tensors, path)
    concept = open_concept(path).concept
    before = weights_with_concept(sd15, Concept(concept.family, {}, made_concept(shapes).tokens))
    assert_same_change(
        weights_with_concept(sd15, concept), weights_with_lora(comfy, sd15, path), before
    )


def test_adapters_that_turn_the_weights_mean_what_they_mean_to_the_stock_loader(
    comfy: Any, sd15: Any, shapes: Any, tmp_path: Path
) -> None:
    """GLoRA, new and old, and the OFT of ComfyUI's own trainer; factors as convolutions of one
    pixel.
    """
    from custom_diffusion.host.comfyui.models.weights import base_model

    with torch.inference_mode():
        base = base_model(sd15.model)
    draw = torch.Generator().manual_seed(6)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * 0.1

    tensors: dict[str, torch.Tensor] = {}
    for number, (layer, (out, width)) in enumerate(shapes.items()):
        new = {"a1": (width, 4), "a2": (4, width), "b1": (out, 4), "b2": (4, width)}
        old = {"a1": (4, width), "a2": (width, 4), "b1": (4, width), "b2": (out, 4)}
        kinds: list[dict[str, torch.Tensor]] = [
            {f"{part}.weight": numbers(*shape) for part, shape in new.items()},
            {f"{part}.weight": numbers(*shape) for part, shape in old.items()},
            {"oft_blocks": numbers(8, out // 8, out // 8)},
            {"lora_up.weight": numbers(out, 4, 1, 1), "lora_down.weight": numbers(4, width, 1, 1)},
        ]
        parts = kinds[number % len(kinds)] | {"alpha": torch.tensor(2.5)}
        tensors |= {f"{PREFIX}{layer}.{part}": tensor for part, tensor in parts.items()}
    path = tmp_path / "adapters.safetensors"
    save_file(tensors, path)
    concept = open_concept(path, base).concept
    before = weights_with_concept(sd15, Concept(concept.family, {}, made_concept(shapes).tokens))
    assert_same_change(
        weights_with_concept(sd15, concept), weights_with_lora(comfy, sd15, path), before
    )


@pytest.mark.parametrize("axis", [0, 1], ids=["columns", "rows"])
def test_dora_means_to_us_what_it_means_to_the_stock_loader(
    axis: int, comfy: Any, sd15: Any, shapes: Any, tmp_path: Path
) -> None:
    from custom_diffusion.host.comfyui.models.weights import base_model

    with torch.inference_mode():
        base = base_model(sd15.model)
    draw = torch.Generator().manual_seed(4)
    tensors: dict[str, torch.Tensor] = {}
    for layer, (out, width) in shapes.items():
        norms = base.weights[layer].float().norm(dim=axis, keepdim=True)
        parts = {
            "lora_up.weight": torch.randn(out, 4, generator=draw) * 0.02,
            "lora_down.weight": torch.randn(4, width, generator=draw) * 0.1,
            "alpha": torch.tensor(2.5),
            "dora_scale": norms * (1 + 0.1 * torch.randn(norms.shape, generator=draw)),
        }
        name = kohya_name(layer, diffusers_blocks=True)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    path = tmp_path / "dora.safetensors"
    save_file(tensors, path)
    concept = open_concept(path, base).concept
    before = weights_with_concept(sd15, Concept(concept.family, {}, made_concept(shapes).tokens))
    ours, theirs = weights_with_concept(sd15, concept), weights_with_lora(comfy, sd15, path)
    if axis == 0:
        assert_same_change(ours, theirs, before)
        return
    # Of rows it takes the norm before the change, others after it: only the direction is the same.
    changed = [name for name in before if not torch.equal(before[name], theirs[name])]
    assert len(changed) == len(shapes)
    for name in changed:
        turned = torch.cosine_similarity(ours[name].double(), theirs[name].double(), dim=1)
        assert (1 - turned).abs().max() < 1e-6
        assert (1 - torch.cosine_similarity(ours[name], before[name], dim=1)).max() > 1e-4


def test_the_stock_tokenizer_reads_an_exported_embedding(
    sd15: Any, shapes: Any, tmp_path: Path
) -> None:
    concept = made_concept(shapes)
    (path,) = export_concept(concept, tmp_path / "cat", "embeddings", dtype=torch.float32)
    clip = sd15.clip.clone()
    clip.tokenizer.clip_l.embedding_directory = str(path.parent)
    (tokens,) = clip.tokenize("embedding:cat on a table")["l"]
    rows = [token for token, *_ in tokens if isinstance(token, torch.Tensor)]
    assert len(rows) == 1
    assert torch.equal(rows[0], concept.tokens[0].embeddings["clip_l"][0])


@pytest.mark.parametrize("kind", ["adobe", "compvis", "hugging-face"])
def test_whole_weights_are_read_with_their_model(
    kind: str, sd15: Any, shapes: Any, tmp_path: Path
) -> None:
    from custom_diffusion.host.comfyui.models.weights import base_model

    concept = small_concept(shapes)
    with torch.inference_mode():
        base = base_model(sd15.model)
    path, *_ = export_concept(concept, tmp_path / "theirs", kind, base, torch.float32)
    read = open_concept(path, base, "cat").concept
    for layer, delta in concept.deltas.items():
        torch.testing.assert_close(read.deltas[layer].dense(), delta.dense(), rtol=1e-3, atol=1e-5)
    assert read.base_hash == base.hash and read.tokens[0].class_noun == "cat"


class Packed(torch.Tensor):
    """As ComfyUI-GGUF keeps a matrix: packed numbers that say they have its shape."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((320, 768))


@pytest.mark.parametrize(
    ("weight", "stored"),
    [
        (torch.zeros(320, 816, dtype=torch.uint8), "uint8 (320, 816)"),
        (torch.zeros(320, 816, dtype=torch.uint8).as_subclass(Packed), "uint8 (320, 768)"),
        (torch.zeros(320, 384), "float32 (320, 384)"),
    ],
    ids=["packed", "packed, of its true shape", "of another shape"],
)
def test_a_quantised_base_is_refused_by_name(
    weight: torch.Tensor, stored: str, sd15: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of GGUF, say: where its weights are read for whole matrices, and where they are trained."""
    from custom_diffusion.concept.errors import IncompatibleModelError
    from custom_diffusion.host.comfyui.models.unet import ComfyDenoiser
    from custom_diffusion.host.comfyui.models.weights import base_model

    network = sd15.model.model.diffusion_model
    layer = network.get_submodule("input_blocks.1.1.transformer_blocks.0.attn2.to_k")
    packed = torch.nn.Parameter(weight, requires_grad=False)
    monkeypatch.setitem(layer._parameters, "weight", packed)
    for read in (base_model, lambda model: ComfyDenoiser(model, torch.float32)):
        with torch.inference_mode(), pytest.raises(IncompatibleModelError) as caught:
            read(sd15.model)
        message = str(caught.value)
        assert "GGUF" in message and stored in message and "from a .safetensors" in message


def small_concept(shapes: Any) -> Concept:
    """With changes of a few per cent of the model's weights, as training makes them."""
    concept = made_concept(shapes, rank=12)
    small = {layer: delta.scaled(0.05) for layer, delta in concept.deltas.items()}
    return replace(concept, deltas=small)


def test_a_delta_is_dropped_in_compressed_exported_and_inspected(
    server: ComfyServer, sd15: Any, shapes: Any
) -> None:
    from custom_diffusion.host.comfyui.models.weights import base_model

    concept = small_concept(shapes)
    with torch.inference_mode():
        base = base_model(sd15.model)
    folder = server.models / "custom_diffusion"
    (delta,) = export_concept(concept, folder / "theirs.bin", "adobe", base, torch.float32)
    graph = {
        "model": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"),
        "load": node(
            "LoadConcept",
            concept_name=delta.name,
            rename_token="<mine>",
            class_noun="cat",
            model=["model", 0],
        ),
        "compress": node(
            "CompressConcept", concept=["load", 0], target="rank", **{"target.rank": 12}
        ),
        "picture": node("PreviewImage", images=["compress", 1]),
        "lora": node(
            "ExportConcept",
            concept=["compress", 0],
            format="kohya-lora",
            name="for others",
            precision="full (fp32)",
        ),
        "inspect": node("InspectConcept", concept=["compress", 0], model=["model", 0]),
    }
    entry = server.run(graph)
    said = {name: told["text"][0] for name, told in entry["outputs"].items() if "text" in told}
    assert "<mine> cat" in said["load"] and "Adobe" in said["load"]
    assert "times smaller" in said["compress"] and "fits" in said["inspect"]
    lora = open_concept(server.models / "loras" / "for-others.safetensors").concept
    for layer, delta_before in concept.deltas.items():
        torch.testing.assert_close(
            lora.deltas[layer].dense(), delta_before.dense(), rtol=1e-2, atol=1e-5
        )
    (picture,) = server.images(entry, "picture")
    assert picture.shape[-1] == 3 and picture.std() > 10
    listing = server.get("/custom_diffusion/concepts")
    assert listing["other"] == [delta.name] and listing["unreadable"] == {}
    assert server.get(f"/custom_diffusion/concepts/{delta.name}")["other"]


def test_connections_of_options_that_are_not_chosen_are_passed_over(
    server: ComfyServer, shapes: Any
) -> None:
    """Programs send them; the page takes them away."""
    folder = server.models / "custom_diffusion"
    write_concept(made_concept(shapes, rank=4), folder / "leftover.safetensors")
    leftover = {"target.clip": ["model", 1], "concepts.concept_2": ["load", 0]}
    chosen = {"concepts": "1", "concepts.concept_1": ["load", 0], "concepts.strength_1": 1.0}
    compress = {"target": "rank", "target.rank": 2, "target.megabytes": 1.0}
    graph = {
        "model": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"),
        "load": node(
            "LoadConcept", concept_name="leftover.safetensors", rename_token="", class_noun=""
        ),
        "compress": node("CompressConcept", concept=["load", 0], **compress, **leftover),
        "inspect": node("InspectConcept", concept=["compress", 0]),
        "routed": node(
            "RouteConcepts", model=["model", 0], clip=["model", 1], **chosen, **leftover
        ),
        "text": node("CLIPTextEncode", text="a cat", clip=["routed", 1]),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sampled": node(
            "KSampler",
            model=["routed", 0],
            positive=["text", 0],
            negative=["text", 0],
            latent_image=["latent", 0],
            **{"seed": 1, "steps": 1, "cfg": 1.0, "sampler_name": "euler"},
            **{"scheduler": "normal", "denoise": 1.0},
        ),
        "picture": node("VAEDecode", samples=["sampled", 0], vae=["model", 2]),
        "shown": node("PreviewImage", images=["picture", 0]),
    }
    entry = server.run(graph)
    assert "rank 2" in entry["outputs"]["inspect"]["text"][0]
    assert "times smaller" in entry["outputs"]["compress"]["text"][0]
    assert "shown" in entry["outputs"]
