"""Files of other tools. Where a tool can be installed, it reads what we write and writes what we
read; where it cannot, the test writes the file as the tool's source does.
"""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.concept import Concept, ModifierToken
from custom_diffusion.concept.delta import DenseDelta, LowRankDelta
from custom_diffusion.concept.errors import (
    ConceptFileError,
    CustomDiffusionError,
    IncompatibleModelError,
)
from custom_diffusion.concept.file import write_concept
from custom_diffusion.concept.layers import FAMILIES, layer_to_diffusers
from custom_diffusion.formats.base import BaseModel, read_base
from custom_diffusion.formats.exporting import FORMATS, bake, export_concept
from custom_diffusion.formats.importing import open_concept
from custom_diffusion.formats.names import hugging_face_name, kohya_name, layer_of
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny_models import tiny_pipeline, tiny_xl_pipeline
from torch import Tensor, nn

SD15, SDXL = FAMILIES["sd15"], FAMILIES["sdxl"]
WHOLE = [kind for kind, format in FORMATS.items() if format.needs_base]


def base_of(unet: nn.Module) -> BaseModel:
    return BaseModel.of(unet.named_parameters())


def concept_on(base: BaseModel, rank: int | None, words: int = 1, vectors: int = 1) -> Concept:
    """Random changes of every key and value projection, a few per cent of its weights."""
    draw = torch.Generator().manual_seed(7)
    deltas: dict[str, DenseDelta | LowRankDelta] = {}
    for layer, weight in base.weights.items():
        if not layer.endswith(("to_k", "to_v")):
            continue
        change = 0.05 * weight.std() * torch.randn(weight.shape, generator=draw)
        if rank is None:
            deltas[layer] = DenseDelta(change)
        else:
            down = torch.randn(rank, weight.shape[1], generator=draw)
            deltas[layer] = LowRankDelta(change[:, :rank], down)
    family = base.family
    tokens = tuple(
        ModifierToken(
            f"<new{n}>",
            "cat",
            {e: torch.randn(vectors, w, generator=draw) for e, w in family.text_encoders.items()},
        )
        for n in range(1, words + 1)
    )
    return Concept(family, deltas, tokens, base_hash=base.hash)


def mixed_ranks(concept: Concept) -> Concept:
    """The same with 1 to 12 components in each layer."""
    deltas: dict[str, DenseDelta | LowRankDelta] = {}
    for number, (layer, delta) in enumerate(concept.deltas.items()):
        assert isinstance(delta, LowRankDelta)
        rank = (1, 12, 3, 5, 12, 8)[number % 6]
        deltas[layer] = LowRankDelta(delta.up[:, :rank], delta.down[:rank])
    return replace(concept, deltas=deltas)


@cache
def base_for(make: Callable[[], Any]) -> BaseModel:
    return base_of(make().unet)


@pytest.fixture
def pipeline() -> Any:
    pipeline = tiny_pipeline()
    pipeline.tokenizer = copy.deepcopy(pipeline.tokenizer)  # words are added to it
    return pipeline


@pytest.fixture
def base() -> BaseModel:
    return base_for(tiny_pipeline)


def prediction(unet: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=draw)
    context = torch.randn(2, 77, 768, generator=draw)
    with torch.no_grad():
        return unet(latents, torch.tensor([10, 500]), context).sample


def changed(unet: nn.Module, concept: Concept) -> nn.Module:
    """A copy with the concept added to its weights, one by one."""
    copied = copy.deepcopy(unet)
    for layer, delta in concept.deltas.items():
        copied.get_parameter(f"{layer_to_diffusers(layer)}.weight").data += delta.dense()
    return copied


def assert_same(read: Concept, written: Concept, tolerance: float = 1e-6) -> None:
    assert read.family == written.family and read.deltas.keys() == written.deltas.keys()
    for layer, delta in written.deltas.items():
        torch.testing.assert_close(
            read.deltas[layer].dense(), delta.dense(), rtol=1e-4, atol=tolerance
        )
    assert [t.name for t in read.tokens] == [t.name for t in written.tokens]
    for ours, theirs in zip(read.tokens, written.tokens, strict=True):
        for encoder, rows in theirs.embeddings.items():
            assert torch.equal(ours.embeddings[encoder], rows)


class TestNames:
    @pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline])
    def test_every_tool_means_the_same_layer(self, make: Callable[[], Any]) -> None:
        unet = make().unet
        paths = [n.removesuffix(".weight") for n, _ in unet.named_parameters() if "attn2" in n]
        layers = {path: layer for path in paths if (layer := layer_of(path))}
        assert (
            len(set(layers.values())) == len(layers) == len([p for p in paths if ".bias" not in p])
        )
        for path, layer in layers.items():
            flat = path.replace(".", "_")
            for name in (f"unet.{path}", f"lora_unet_{flat}", f"diffusion_model.{layer}"):
                assert layer_of(name) == layer
            assert layer_of(f"model.diffusion_model.{layer}") == layer
            assert layer_of(kohya_name(layer, diffusers_blocks=True)) == layer
            assert layer_of(kohya_name(layer, diffusers_blocks=False)) == layer
            assert layer_of(hugging_face_name(layer).replace("_custom_diffusion", "")) == layer

    @pytest.mark.parametrize(
        "name",
        [
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k",
            "lora_te_text_model_encoder_layers_0_self_attn_k_proj",
            "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2",
            "",
        ],
    )
    def test_other_layers_are_none(self, name: str) -> None:
        assert layer_of(name) is None


@pytest.mark.parametrize("rank", [None, 4], ids=["dense", "low-rank"])
@pytest.mark.parametrize("make", [tiny_pipeline, tiny_xl_pipeline], ids=["sd15", "sdxl"])
@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_exported_is_imported_again(
    kind: str, make: Callable[[], Any], rank: int | None, tmp_path: Path
) -> None:
    base = base_for(make)
    concept = concept_on(base, rank)
    export: Callable[[], list[Path]] = lambda: export_concept(  # noqa: E731
        concept, tmp_path / "cat.safetensors", kind, base, torch.float32
    )
    if FORMATS[kind].needs_low_rank and rank is None:
        with pytest.raises(ConceptFileError, match="Compress it first"):
            export()
        return
    if make is tiny_xl_pipeline and kind in ("compvis", "hugging-face"):
        with pytest.raises(ConceptFileError, match="room for one"):
            export()
        return
    paths = export()
    read = open_concept(paths[0], base, "cat")
    expected = concept
    if kind.endswith("-lora") or kind == "a1111-delta":
        expected = replace(concept, tokens=())
    if kind == "embeddings":
        expected = replace(concept, deltas={}, tokens=(replace(concept.tokens[0], name="<new1>"),))
        read_token = replace(read.concept.tokens[0], name="<new1>")
        assert make is tiny_xl_pipeline or read.concept.tokens[0].name == "<new1>"
        read = replace(read, concept=replace(read.concept, tokens=(read_token,)))
    assert_same(read.concept, expected)
    assert read.notes == ()
    if kind in WHOLE:
        assert read.concept.base_hash == base.hash


def test_a_name_that_ends_in_a_number_keeps_it(base: BaseModel, tmp_path: Path) -> None:
    concept = concept_on(base, 1)
    names = [
        export_concept(concept, tmp_path / "cat-1", "kohya-lora", number_if_taken=True)[0].name
        for _ in range(3)
    ]
    assert names == ["cat-1.safetensors", "cat-1-2.safetensors", "cat-1-3.safetensors"]


class TestDiffusersReads:
    def test_custom_diffusion_weights(self, pipeline: Any, base: BaseModel, tmp_path: Path) -> None:
        concept = concept_on(base, None)
        wanted = prediction(changed(pipeline.unet, concept))
        before = prediction(pipeline.unet)
        weights, word = export_concept(concept, tmp_path / "cat", "hugging-face", base)
        pipeline.unet.load_attn_procs(
            weights.parent, weight_name=weights.name, _pipeline=pipeline, use_safetensors=False
        )
        torch.testing.assert_close(prediction(pipeline.unet), wanted, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(before, wanted, atol=1e-3)
        pipeline.load_textual_inversion(word)
        self._knows(pipeline, concept)

    @pytest.mark.parametrize("kind", ["diffusers-lora", "kohya-lora"])
    def test_a_lora(self, kind: str, pipeline: Any, base: BaseModel, tmp_path: Path) -> None:
        concept = concept_on(base, 4)
        wanted = prediction(changed(pipeline.unet, concept))
        path = tmp_path / "cat.safetensors"
        export_concept(concept, path, kind, dtype=torch.float32)
        pipeline.load_lora_weights(path)
        torch.testing.assert_close(prediction(pipeline.unet), wanted, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", ["diffusers-lora", "kohya-lora"])
    def test_a_lora_of_mixed_ranks(
        self, kind: str, pipeline: Any, base: BaseModel, tmp_path: Path
    ) -> None:
        """Layer by layer: as `compress` by size or energy leaves them."""
        concept = mixed_ranks(concept_on(base, 12))
        export_concept(concept, tmp_path / "cat.safetensors", kind, dtype=torch.float32)
        ranks = {
            t.shape[0] for n, t in load_file(tmp_path / "cat.safetensors").items() if "_A" in n
        }
        assert kind == "kohya-lora" or ranks == {12}, "diffusers 0.34 needs one rank"
        unet = copy.deepcopy(pipeline.unet)
        loaded = copy.copy(pipeline)
        loaded.unet = unet
        loaded.load_lora_weights(tmp_path, weight_name="cat.safetensors")
        unet.fuse_lora()
        changes = changes_by_peft(unet, pipeline.unet)
        assert changes.keys() == concept.deltas.keys()
        for layer, delta in concept.deltas.items():
            torch.testing.assert_close(changes[layer], delta.dense(), rtol=1e-4, atol=1e-6)

    def test_embeddings(self, pipeline: Any, base: BaseModel, tmp_path: Path) -> None:
        concept = concept_on(base, None, words=2)
        paths = export_concept(concept, tmp_path / "cat", "embeddings", dtype=torch.float32)
        assert [path.name for path in paths] == ["cat-new1.safetensors", "cat-new2.safetensors"]
        for path in paths:
            pipeline.load_textual_inversion(path)
        self._knows(pipeline, concept)

    def test_adobes_delta_by_names_alone(
        self, pipeline: Any, base: BaseModel, tmp_path: Path
    ) -> None:
        concept = concept_on(base, None)
        (path,) = export_concept(concept, tmp_path / "delta.bin", "adobe", base, torch.float32)
        state = torch.load(path, weights_only=True)["unet"]
        wanted = prediction(changed(pipeline.unet, concept))
        assert not pipeline.unet.load_state_dict(state, strict=False).unexpected_keys
        torch.testing.assert_close(prediction(pipeline.unet), wanted, rtol=1e-5, atol=1e-6)

    def _knows(self, pipeline: Any, concept: Concept) -> None:
        table = pipeline.text_encoder.get_input_embeddings().weight
        for token in concept.tokens:
            index = pipeline.tokenizer.convert_tokens_to_ids(token.name)
            torch.testing.assert_close(
                table[index], token.embeddings["clip_l"][0], rtol=1e-3, atol=1e-3
            )


class TestDiffusersWrites:
    @pytest.mark.parametrize(
        "kind", [{}, {"lora_alpha": 10}, {"use_rslora": True}, {"use_dora": True, "lora_alpha": 10}]
    )
    def test_a_lora_of_peft(
        self, pipeline: Any, base: BaseModel, tmp_path: Path, kind: dict[str, Any]
    ) -> None:
        settings = LoraConfig(
            r=4,
            target_modules=["attn2.to_k", "attn2.to_v", "attn1.to_q"],
            **{"lora_alpha": 4, **kind},
        )
        unet = copy.deepcopy(pipeline.unet)
        unet.add_adapter(settings)
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
                if "lora_magnitude" in name:
                    parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
        pipeline.save_lora_weights(
            tmp_path,
            unet_lora_layers=get_peft_model_state_dict(unet),
            unet_lora_adapter_metadata=settings.to_dict() | {"target_modules": ["attn2.to_k"]},
        )
        path = tmp_path / "pytorch_lora_weights.safetensors"
        if settings.use_dora:
            with pytest.raises(ConceptFileError, match=r"safetensors.*DoRA.*Give the base model"):
                open_concept(path)
        opened = open_concept(path, base if settings.use_dora else None, class_noun="cat")
        assert len(opened.concept.deltas) == 12
        assert opened.concept.base_hash == (base.hash if settings.use_dora else "")
        assert "6 modules that are not cross-attention" in opened.notes[0]
        unet.fuse_lora()
        wanted = changes_by_peft(unet, pipeline.unet)
        for layer, delta in opened.concept.deltas.items():
            torch.testing.assert_close(delta.dense(), wanted[layer], rtol=1e-4, atol=1e-6)


def changes_by_peft(unet: nn.Module, before: nn.Module) -> dict[str, Tensor]:
    """What PEFT's own merge adds to each matrix of cross-attention."""
    changes = {}
    for name, module in unet.named_modules():
        layer = layer_of(name)
        if layer and hasattr(module, "base_layer"):
            path = f"{layer_to_diffusers(layer)}.weight"
            changes[layer] = module.base_layer.weight.detach() - before.get_parameter(path).detach()
    return changes


class TestOtherFiles:
    """Written as the tools' own sources write them."""

    def test_a_compvis_delta(self, base: BaseModel, tmp_path: Path) -> None:
        concept = concept_on(base, None, words=2)
        state: dict[str, Any] = {
            f"model.diffusion_model.{layer}.weight": base.weights[layer] + delta.dense()
            for layer, delta in concept.deltas.items()
        }
        state["embed"] = torch.cat([t.embeddings["clip_l"] for t in concept.tokens])
        torch.save({"state_dict": state}, tmp_path / "delta_epoch=000004.ckpt")
        assert_same(open_concept(tmp_path / "delta_epoch=000004.ckpt", base).concept, concept)

    def test_a_compressed_delta_whose_compression_left_nothing_of_a_layer(
        self, base: BaseModel, tmp_path: Path
    ) -> None:
        concept = concept_on(base, 3)
        unet: dict[str, Any] = {
            f"{layer_to_diffusers(layer)}.weight": {"u": delta.up, "v": delta.down}
            for layer, delta in concept.deltas.items()
            if isinstance(delta, LowRankDelta)
        }
        first, *_ = concept.layers
        whole = unet[f"{layer_to_diffusers(first)}.weight"]
        unet[f"{layer_to_diffusers(first)}.weight"] = {k: t[:, :0] for k, t in whole.items()} | {
            "v": whole["v"][:0]
        }
        torch.save({"unet": unet, "modifier_token": {}}, tmp_path / "compressed_delta.bin")
        kept = {layer: delta for layer, delta in concept.deltas.items() if layer != first}
        opened = open_concept(tmp_path / "compressed_delta.bin")
        assert_same(opened.concept, replace(concept, deltas=kept, tokens=()))

    def test_an_ed_lora(self, base: BaseModel, tmp_path: Path) -> None:
        concept = concept_on(base, 4)
        unet: dict[str, Tensor] = {}
        for layer, delta in concept.deltas.items():
            assert isinstance(delta, LowRankDelta)
            unet[f"{layer_to_diffusers(layer)}.lora_up.weight"] = delta.up
            unet[f"{layer_to_diffusers(layer)}.lora_down.weight"] = delta.down
        words = {"<potter1>": torch.randn(16, 768), "<potter2>": torch.ones(16, 768)}
        params = {"new_concept_embedding": words, "text_encoder": {"a.lora_up.weight": words}}
        torch.save({"params": {**params, "unet": unet}}, tmp_path / "edlora.pth")
        opened = open_concept(tmp_path / "edlora.pth")
        for layer, delta in concept.deltas.items():
            assert torch.equal(opened.concept.deltas[layer].dense(), delta.dense())
        first, second = opened.concept.tokens
        torch.testing.assert_close(first.embeddings["clip_l"][0], words["<potter1>"].mean(0))
        assert torch.equal(second.embeddings["clip_l"], torch.ones(1, 768))
        assert any("16 layers" in note for note in opened.notes)
        assert any("text encoder" in note for note in opened.notes)

    def test_loha_and_lokr(self, base: BaseModel, tmp_path: Path) -> None:
        first, second, third = [k for k in base.weights if k.endswith("to_k")][:3]
        out, width = base.weights[first].shape
        a, b, c, d = (torch.randn(out, 2), torch.randn(2, width)) * 2
        e, f, g = torch.randn(4, 3), torch.randn(out // 4, 2), torch.randn(2, width // 3)
        tensors = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c + 1, "hada_w2_b": d}
        named = {f"{kohya_name(first, diffusers_blocks=True)}.{k}": t for k, t in tensors.items()}
        named[f"{kohya_name(first, diffusers_blocks=True)}.alpha"] = torch.tensor(1.0)
        tensors = {"lokr_w1": e, "lokr_w2_a": f, "lokr_w2_b": g, "alpha": torch.tensor(3.0)}
        named |= {f"{kohya_name(second, diffusers_blocks=True)}.{k}": t for k, t in tensors.items()}
        named[f"{kohya_name(third, diffusers_blocks=True)}.diff"] = torch.ones(out, width)
        save_file({k: t.clone() for k, t in named.items()}, tmp_path / "lycoris.safetensors")
        deltas = open_concept(tmp_path / "lycoris.safetensors").concept.deltas
        torch.testing.assert_close(deltas[first].dense(), (a @ b) * ((c + 1) @ d) / 2)
        torch.testing.assert_close(deltas[second].dense(), torch.kron(e, f @ g) * 1.5)
        assert torch.equal(deltas[third].dense(), torch.ones(out, width))

    @pytest.mark.parametrize("axis", [0, 1], ids=["columns", "rows"])
    def test_dora_gives_each_row_or_column_its_magnitude(
        self, axis: int, base: BaseModel, tmp_path: Path
    ) -> None:
        layer = next(k for k in base.weights if k.endswith("to_k"))
        weight = base.weights[layer]
        (out, width), magnitude = weight.shape, weight.norm(dim=axis, keepdim=True) * 1.1
        factors = {
            "lokr_w1": torch.randn(4, 3) * 0.1,
            "lokr_w2": torch.randn(out // 4, width // 3) * 0.01,
        }
        tensors = {**factors, "dora_scale": magnitude}
        name = kohya_name(layer, diffusers_blocks=True)
        save_file({f"{name}.{k}": t for k, t in tensors.items()}, tmp_path / "dora.safetensors")
        change = open_concept(tmp_path / "dora.safetensors", base).concept.deltas[layer].dense()
        moved = weight + torch.kron(*factors.values())
        torch.testing.assert_close((weight + change).norm(dim=axis, keepdim=True), magnitude)
        directions = torch.cosine_similarity(weight + change, moved, dim=axis)
        torch.testing.assert_close(directions, torch.ones_like(directions))

    @pytest.mark.parametrize("shape", [(3, 1), (1, 3), (768,), ()])
    def test_magnitudes_that_fit_neither_rows_nor_columns(
        self, shape: tuple[int, ...], base: BaseModel, tmp_path: Path
    ) -> None:
        layer = next(k for k in base.weights if k.endswith("to_k"))
        name = kohya_name(layer, diffusers_blocks=True)
        tensors = {"diff": torch.ones(base.weights[layer].shape), "dora_scale": torch.ones(shape)}
        save_file({f"{name}.{k}": t for k, t in tensors.items()}, tmp_path / "dora.safetensors")
        with pytest.raises(ConceptFileError, match=r"dora\.safetensors.*neither"):
            open_concept(tmp_path / "dora.safetensors", base)

    def test_dora_of_another_models_shapes_is_refused(
        self, base: BaseModel, tmp_path: Path
    ) -> None:
        name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
        huge = {"lora_up.weight": (1 << 20, 1), "lora_down.weight": (1, 1 << 20)}
        tensors = {
            k: torch.ones(shape) for k, shape in {**huge, "dora_scale": (1 << 20, 1)}.items()
        }
        save_file({f"{name}.{k}": t for k, t in tensors.items()}, tmp_path / "dora.safetensors")
        with pytest.raises(IncompatibleModelError, match="Give the model"):
            open_concept(tmp_path / "dora.safetensors", base)

    @pytest.mark.parametrize(
        ("write", "name"),
        [
            (lambda p, r: torch.save({"<cat-toy>": r[0]}, p), "<cat-toy>"),
            (lambda p, r: torch.save({"string_to_param": {"*": r}, "name": "toy"}, p), "<toy>"),
            (lambda p, r: save_file({"emb_params": r}, p), "<my-toy-v2>"),
            (lambda p, r: torch.save(r, p), "<my-toy-v2>"),
        ],
    )
    def test_embeddings(self, write: Any, name: str, tmp_path: Path) -> None:
        rows = torch.randn(1, 768)
        path = tmp_path / "my toy.v2.pt"
        write(path, rows)
        concept = open_concept(path, class_noun="toy").concept
        assert [(t.name, t.class_noun) for t in concept.tokens] == [(name, "toy")]
        assert torch.equal(concept.tokens[0].embeddings["clip_l"], rows)
        assert not concept.deltas and concept.family is SD15
        assert concept.constraint_prompts == (f"{name} toy", f"photo of a {name} toy")

    def test_an_own_concept_file_stays_what_it_is(self, base: BaseModel, tmp_path: Path) -> None:
        concept = concept_on(base, 2)
        write_concept(concept, tmp_path / "own.safetensors", torch.float32)
        opened = open_concept(tmp_path / "own.safetensors")
        assert_same(opened.concept, concept)
        assert opened.concept.tokens[0].class_noun == "cat"


class TestBaseModel:
    def test_whole_weights_need_one(self, base: BaseModel, tmp_path: Path) -> None:
        (path,) = export_concept(concept_on(base, None), tmp_path / "delta.bin", "adobe", base)
        with pytest.raises(ConceptFileError, match="Give the base model"):
            open_concept(path)

    def test_another_checkpoint_is_refused(self, base: BaseModel, tmp_path: Path) -> None:
        (path,) = export_concept(concept_on(base, None), tmp_path / "delta.bin", "adobe", base)
        with pytest.raises(IncompatibleModelError, match="another base"):
            open_concept(path, base_of(tiny_pipeline(seed=1).unet))
        with pytest.raises(IncompatibleModelError, match="another checkpoint"):
            export_concept(
                concept_on(base, None), tmp_path / "b", "adobe", base_of(tiny_pipeline(seed=1).unet)
            )

    def test_another_family_is_refused(self, base: BaseModel, tmp_path: Path) -> None:
        (path,) = export_concept(concept_on(base, None), tmp_path / "delta.bin", "adobe", base)
        with pytest.raises(IncompatibleModelError, match="Give the model"):
            open_concept(path, base_for(tiny_xl_pipeline))

    def test_it_is_read_from_a_folder_and_from_a_checkpoint(
        self, pipeline: Any, base: BaseModel, tmp_path: Path
    ) -> None:
        pipeline.save_pretrained(tmp_path / "model")
        checkpoint = {
            f"model.diffusion_model.{layer}.weight": w for layer, w in base.weights.items()
        }
        save_file({**checkpoint, "vae.x": torch.ones(2)}, tmp_path / "sd.safetensors")
        for path in (tmp_path / "model", tmp_path / "sd.safetensors"):
            assert read_base(path).hash == base.hash
        save_file({"vae.x": torch.ones(2)}, tmp_path / "vae.safetensors")
        with pytest.raises(IncompatibleModelError, match=r"vae\.safetensors.*no cross-attention"):
            read_base(tmp_path / "vae.safetensors")
        odd = {name: torch.ones(8) for name in checkpoint}
        save_file(odd, tmp_path / "odd.safetensors")
        with pytest.raises(ConceptFileError, match=r"odd\.safetensors.*a matrix is needed"):
            read_base(tmp_path / "odd.safetensors")

    @pytest.mark.parametrize("nested", [True, False], ids=["pipeline", "unet"])
    def test_it_is_read_from_several_files(
        self, nested: bool, pipeline: Any, base: BaseModel, tmp_path: Path
    ) -> None:
        unet = tmp_path / "unet" if nested else tmp_path
        pipeline.unet.save_pretrained(unet, max_shard_size="1MB")
        index = unet / "diffusion_pytorch_model.safetensors.index.json"
        assert len(list(unet.glob("*.safetensors"))) > 2
        for path in (tmp_path, unet, index):
            assert read_base(path).hash == base.hash

    def test_a_file_of_several_that_is_missing_is_named(
        self, pipeline: Any, tmp_path: Path
    ) -> None:
        pipeline.unet.save_pretrained(tmp_path, max_shard_size="1MB")
        lost = sorted(tmp_path.glob("*.safetensors"))[1]
        content = lost.read_bytes()
        lost.write_bytes(content[:100])
        with pytest.raises(
            ConceptFileError, match=rf"{lost.name} cannot be read.*copy or download it again"
        ):
            read_base(tmp_path)
        lost.unlink()
        with pytest.raises(ConceptFileError, match=rf"index\.json.*{lost.name}.*Copy the missing"):
            read_base(tmp_path)

    @pytest.mark.parametrize(
        "text",
        [
            *("", "[", "[" * 100000, "3", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'),
            *(f'{{"weight_map": {{"a": "{p}"}}}}' for p in ("..", "", "x\\u0000", "x" * 5000)),
            *(
                f'{{"weight_map": {{"a": "{path}"}}}}'
                for path in ("../secret.safetensors", "/etc/passwd", "..\\\\up", "C:x", "a/../../b")
            ),
        ],
    )
    def test_an_index_that_is_none(self, text: str, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        folder.mkdir()
        weight = {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.ones(8, 9)}
        save_file(weight, tmp_path / "secret.safetensors")
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
        with pytest.raises(ConceptFileError, match=r"model\.safetensors\.index\.json"):
            read_base(folder)

    def test_a_baked_unet_draws_as_the_concept_does(
        self, pipeline: Any, base: BaseModel, tmp_path: Path
    ) -> None:
        pipeline.unet.save_pretrained(tmp_path / "unet")
        file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
        concept = concept_on(base, 4)
        assert bake(concept, file, tmp_path / "baked.safetensors") == ["<new1>"]
        wanted = prediction(changed(pipeline.unet, concept))
        pipeline.unet.load_state_dict(load_file(tmp_path / "baked.safetensors"))
        assert torch.equal(prediction(pipeline.unet), wanted)
        with pytest.raises(ConceptFileError, match="exists already"):
            bake(concept, file, tmp_path / "baked.safetensors")


class _Harm:
    """Unpickled, it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


class TestBadFiles:
    def test_a_pickle_that_runs_code_does_not(self, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        torch.save({"unet": _Harm(victim)}, tmp_path / "delta.bin")
        with pytest.raises(ConceptFileError, match="was not done"):
            open_concept(tmp_path / "delta.bin")
        torch.save(_Harm(victim), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
        with pytest.raises(ConceptFileError, match="bare pickle"):
            open_concept(tmp_path / "old.bin")
        assert not victim.exists()

    @pytest.mark.parametrize("kind", ["adobe", "comfyui-lora", "embeddings"])
    def test_cut_short_anywhere(self, kind: str, base: BaseModel, tmp_path: Path) -> None:
        (path,) = export_concept(concept_on(base, None), tmp_path / "whole", kind, base)
        content = path.read_bytes()
        for share in (0, 0.001, 0.1, 0.5, 0.9, 0.999):
            path.write_bytes(content[: int(share * len(content))])
            with pytest.raises(ConceptFileError, match="whole"):
                open_concept(path, base)

    def test_a_zip_that_is_no_archive_of_pytorch(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"0" * (1 << 20))
        with pytest.raises(ConceptFileError, match="compressed"):
            open_concept(tmp_path / "bomb.pt")

    def test_a_tensor_larger_than_its_file(self, tmp_path: Path) -> None:
        torch.save({"<big>": torch.zeros(1).expand(1 << 40, 768)}, tmp_path / "big.bin")
        with pytest.raises(ConceptFileError, match="more than the whole file"):
            open_concept(tmp_path / "big.bin")

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({"hada_w1_a": (1 << 20, 1), "hada_w1_b": (1, 1 << 20)}, "more than any layer"),
            ({"lokr_w1": (4096, 64), "lokr_w2": (4096, 64)}, "more than any layer"),
            ({"lora_up.weight": (8, 2), "lora_down.weight": (3, 768)}, "do not chain"),
            ({"lora_up.weight": (8, 2), "lora_down.weight": (2, 99)}, "width 99"),
            ({"lora_up.weight": (8, 2, 3, 3), "lora_down.weight": (2, 768)}, "not matrices"),
            ({"lora_up.weight": (8, 2)}, "made of up"),
            (
                {"lora_up.weight": (8, 2), "lora_down.weight": (2, 768), "dora_scale": (8, 1)},
                "DoRA.*Give the base model",
            ),
            ({"dora_scale": (8, 1)}, "made of magnitude"),
        ],
    )
    def test_factors_that_cannot_be(
        self, tensors: dict[str, tuple[int, ...]], message: str, tmp_path: Path
    ) -> None:
        layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
        named = {f"{layer}.{part}": torch.zeros(shape) for part, shape in tensors.items()}
        if "hada_w1_a" in tensors:
            named |= {k.replace("w1", "w2"): t.clone() for k, t in named.items()}
        save_file(named, tmp_path / "bad.safetensors")
        with pytest.raises(CustomDiffusionError, match=message) as caught:
            open_concept(tmp_path / "bad.safetensors")
        assert "bad.safetensors" in str(caught.value) or message == "width 99"

    def test_values_that_are_not_finite(self, tmp_path: Path) -> None:
        torch.save({"<nan>": torch.full((768,), float("nan"))}, tmp_path / "nan.bin")
        with pytest.raises(ConceptFileError, match="not finite"):
            open_concept(tmp_path / "nan.bin")

    @pytest.mark.parametrize(
        "values", [{}, {"vae.weight": torch.ones(3)}, {"unet": {}}, {"state_dict": {"a": 1}}]
    )
    def test_files_that_are_something_else(self, values: dict[str, Any], tmp_path: Path) -> None:
        torch.save(values, tmp_path / "else.bin")
        with pytest.raises(ConceptFileError, match="nothing that can be made one"):
            open_concept(tmp_path / "else.bin")

    def test_a_lora_without_cross_attention(self, tmp_path: Path) -> None:
        layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"
        tensors = {f"{layer}.lora_up.weight": (8, 2), f"{layer}.lora_down.weight": (2, 768)}
        save_file({k: torch.ones(s) for k, s in tensors.items()}, tmp_path / "lora.safetensors")
        with pytest.raises(ConceptFileError, match="no cross-attention"):
            open_concept(tmp_path / "lora.safetensors")

    @pytest.mark.parametrize("text", ["{", "[" * 100000, '{"entries": {"a": "delta"}}', "3"])
    def test_headers_that_are_no_description(self, text: str, tmp_path: Path) -> None:
        save_file({"x": torch.ones(2)}, tmp_path / "head.safetensors", {"json": text})
        with pytest.raises(ConceptFileError, match="head.safetensors"):
            open_concept(tmp_path / "head.safetensors")

    def test_nothing_is_replaced(self, base: BaseModel, tmp_path: Path) -> None:
        (tmp_path / "cat.safetensors").write_text("mine")
        with pytest.raises(ConceptFileError, match="exists already"):
            export_concept(concept_on(base, 2), tmp_path / "cat.safetensors", "comfyui-lora")
        assert (tmp_path / "cat.safetensors").read_text() == "mine"


def test_what_was_left_out_is_kept_with_the_concept(base: BaseModel, tmp_path: Path) -> None:
    concept = concept_on(base, 2)
    (path,) = export_concept(concept, tmp_path / "lora.safetensors", "kohya-lora")
    tensors = load_file(path) | {
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(8, 2)
    }
    save_file(tensors, path)
    opened = open_concept(path)
    assert opened.notes and opened.concept.provenance["left_out"] == list(opened.notes)
    assert opened.concept.provenance["imported_from"] == "lora.safetensors"
    write_concept(opened.concept, tmp_path / "concept.safetensors")
    with safe_open(tmp_path / "concept.safetensors", framework="pt") as file:
        assert "lora_te" in json.loads(file.metadata()["provenance"])["left_out"][0]


@pytest.mark.parametrize("alpha", ["[]", '{"a": 1}', '"many"'])
def test_settings_of_peft_that_are_no_numbers(alpha: str, tmp_path: Path) -> None:
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = {
        f"{path}.lora_B.weight": torch.ones(8, 2),
        f"{path}.lora_A.weight": torch.ones(2, 768),
    }
    header = {"lora_adapter_metadata": f'{{"unet.lora_alpha": {alpha}}}'}
    save_file(factors, tmp_path / "odd.safetensors", header)
    with pytest.raises(ConceptFileError, match=r"odd\.safetensors"):
        open_concept(tmp_path / "odd.safetensors")


def test_every_refusal_names_the_file(base: BaseModel, tmp_path: Path) -> None:
    (path,) = export_concept(concept_on(base, None), tmp_path / "theirs", "adobe", base)
    with pytest.raises(IncompatibleModelError, match=r"theirs\.bin"):
        open_concept(path, base_for(tiny_xl_pipeline))
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    factors = {"u": torch.ones(8, 2), "v": torch.ones(3, 768)}
    torch.save({"unet": {layer: factors}}, tmp_path / "odd.bin")
    with pytest.raises(ConceptFileError, match=r"odd\.bin.*do not chain.*another copy"):
        open_concept(tmp_path / "odd.bin")
    digits = layer.replace("0", "9" * 5000, 1)
    torch.save({"unet": {digits: torch.ones(8, 768)}}, tmp_path / "digits.bin")
    with pytest.raises(ConceptFileError, match=r"digits\.bin"):
        open_concept(tmp_path / "digits.bin", base)
