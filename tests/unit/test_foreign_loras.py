"""LoRAs of other tools as they really come. diffusers and PEFT, which wrote them, judge what they
mean; hand-made files stand for tools that cannot be installed.
"""

from __future__ import annotations

import copy
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.delta import LowRankDelta
from custom_diffusion.concept.errors import ConceptFileError
from custom_diffusion.concept.file import read_concept, write_concept
from custom_diffusion.concept.layers import layer_to_diffusers
from custom_diffusion.formats.base import BaseModel, read_base
from custom_diffusion.formats.importing import companions, open_concept
from custom_diffusion.formats.names import hugging_face_name, kohya_name, layer_of
from custom_diffusion.formats.peft import matches_end
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from support.tiny_models import tiny_pipeline, tiny_unet
from torch import Tensor, nn

TARGETS = ["attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
FIRST, SECOND = (f"down_blocks.0.attentions.{n}.transformer_blocks.0.attn2.to_k" for n in range(2))


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return tiny_unet()


@pytest.fixture(scope="module")
def base(unet: nn.Module) -> BaseModel:
    return BaseModel.of(unet.named_parameters())


def learnt(unet: nn.Module) -> None:
    """As if the adapter had been trained: nothing of it is zero."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if any(part in name for part in ("lora_B", "hada_w", "lokr_w", "ia3_l")):
                size = 0.05 if "lora_B" in name else 0.2
                parameter.copy_(size * torch.randn(parameter.shape, generator=draw))


def merged_changes(adapted: nn.Module, before: nn.Module) -> dict[str, Tensor]:
    """What PEFT's own merge adds to each matrix."""
    changes = {}
    for name, module in adapted.named_modules():
        layer = layer_of(name)
        if layer and hasattr(module, "base_layer"):
            module.merge()
            path = f"{layer_to_diffusers(layer)}.weight"
            changes[layer] = module.base_layer.weight.detach() - before.get_parameter(path).detach()
    return changes


def assert_changes(path: Path, expected: dict[str, Tensor], **given: Any) -> None:
    deltas = open_concept(path, **given).concept.deltas
    assert deltas.keys() == expected.keys()
    for layer, change in expected.items():
        torch.testing.assert_close(deltas[layer].dense(), change, rtol=1e-4, atol=1e-6)
        assert change.abs().max() > 1e-4


class TestScaleInTheHeader:
    @pytest.mark.parametrize(
        "settings",
        [
            {"r": 4, "lora_alpha": 16},
            {"r": 8, "lora_alpha": 1},
            {"r": 4, "lora_alpha": 16, "use_rslora": True},
            {"r": 4, "alpha_pattern": {"to_k": 2, r"up_blocks\.\d+.*to_v": 32}},
            {"r": 4, "alpha_pattern": {"k": 2, "attn2.to_(v|out.0)": 3, f"^{FIRST}": 9}},
            {"r": 4, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 6}, "use_rslora": True},
        ],
        ids=repr,
    )
    def test_as_diffusers_loads_it(
        self, settings: dict[str, Any], unet: nn.Module, tmp_path: Path
    ) -> None:
        writer = copy.deepcopy(unet)
        writer.add_adapter(LoraConfig(target_modules=TARGETS, **settings))
        learnt(writer)
        writer.save_lora_adapter(tmp_path)
        path = tmp_path / "pytorch_lora_weights.safetensors"
        reader = copy.deepcopy(unet)
        # Given the file itself, it passes over the header.
        reader.load_lora_adapter(tmp_path, weight_name=path.name, prefix=None)
        assert_changes(path, merged_changes(reader, unet))

    def test_of_a_pipeline(self, unet: nn.Module, tmp_path: Path) -> None:
        settings = LoraConfig(r=4, lora_alpha=16, target_modules=["attn2.to_k"])
        writer = copy.deepcopy(unet)
        writer.add_adapter(settings)
        learnt(writer)
        pipeline = tiny_pipeline()
        pipeline.save_lora_weights(
            tmp_path,
            unet_lora_layers=get_peft_model_state_dict(writer),
            unet_lora_adapter_metadata=settings.to_dict() | {"target_modules": ["attn2.to_k"]},
        )
        path = tmp_path / "pytorch_lora_weights.safetensors"
        pipeline.unet = copy.deepcopy(unet)
        pipeline.load_lora_weights(path)
        assert_changes(path, merged_changes(pipeline.unet, unet))

    def test_settings_of_a_text_encoder_alone_say_nothing(self, tmp_path: Path) -> None:
        factors = {f"unet.{FIRST}.lora_A.weight": torch.ones(2, 768)}
        factors |= {f"unet.{FIRST}.lora_B.weight": torch.ones(32, 2)}
        header = {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 16})}
        save_file(factors, tmp_path / "a.safetensors", header)
        (delta,) = open_concept(tmp_path / "a.safetensors").concept.deltas.values()
        assert torch.equal(delta.dense(), torch.full((32, 768), 2.0))

    @pytest.mark.parametrize("path", [FIRST, SECOND, "mid_block.attn2.to_v", "to_k", ""])
    @pytest.mark.parametrize(
        "pattern",
        [
            *("to_k", "k", "", ".*", "attn2.to_k", "attn2.to_(k|v)", "^to_k", f"^{FIRST}", FIRST),
            *(r"down_blocks\.\d+\.attentions\.[01].*", "to_k|to_v", ".*attn2.*", "a*ttn2.to_k"),
            *("mid_block.*", ".+k", "(?:to_k|to_v)", "[^k]o_k", "to_k?"),
            *("to_k$", "o_k", ".to_k", "down_blocks.*?to_k", r"\w+"),
        ],
    )
    def test_patterns_fit_as_for_peft(self, pattern: str, path: str) -> None:
        # PEFT says the pattern it took, or the path where none fits.
        assert matches_end(pattern, path) == (re.match(rf"(.*\.)?({pattern})$", path) is not None)
        if matches_end(pattern, path):
            assert get_pattern_key([pattern], path) == pattern

    @pytest.mark.timeout(20)
    @pytest.mark.parametrize("pattern", ["(a+)+", "(.*)*", "((a))", "a{9}", "(?i)a", r"\b", "["])
    def test_patterns_that_could_take_for_ever_are_refused(
        self, pattern: str, tmp_path: Path
    ) -> None:
        factors = {f"{FIRST}.lora_A.weight": torch.ones(2, 768)}
        factors |= {f"{FIRST}.lora_B.weight": torch.ones(32, 2)}
        settings = {"lora_alpha": 1, "alpha_pattern": {pattern: 2}}
        header = {"lora_adapter_metadata": json.dumps(settings)}
        save_file(factors, tmp_path / "a.safetensors", header)
        with pytest.raises(ConceptFileError, match="pattern"):
            open_concept(tmp_path / "a.safetensors")

    @pytest.mark.timeout(20)
    def test_a_pattern_of_many_stars_is_quick(self) -> None:
        assert not matches_end(".*" * 60 + "x", FIRST * 3)


class TestPeftFolder:
    @pytest.mark.parametrize(
        "settings",
        [
            LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS),
            LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=TARGETS),
            LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
            LoHaConfig(r=4, alpha=2, target_modules=TARGETS),
            LoKrConfig(r=4, alpha=2, target_modules=TARGETS),
            LoKrConfig(r=64, alpha=2, target_modules=TARGETS),
            IA3Config(target_modules=TARGETS, feedforward_modules=TARGETS[:1]),
        ],
        ids=["lora", "stabilised", "dora", "loha", "lokr", "lokr of whole factors", "ia3"],
    )
    def test_as_peft_merges_it(
        self, settings: Any, unet: nn.Module, base: BaseModel, tmp_path: Path
    ) -> None:
        adapted = get_peft_model(copy.deepcopy(unet), settings)
        learnt(adapted)
        adapted.save_pretrained(tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        relative = getattr(settings, "use_dora", False) or isinstance(settings, IA3Config)
        expected = merged_changes(adapted.base_model.model, unet)
        assert_changes(path, expected, base=base if relative else None)
        assert tmp_path / "adapter_config.json" in companions(path)
        (tmp_path / "adapter_config.json").unlink()
        with pytest.raises(ConceptFileError, match=r"adapter_config\.json beside it"):
            open_concept(path, base)

    @pytest.mark.parametrize("text", ["{", "[]", '{"lora_alpha": "x"}', '{"lora_alpha": true}'])
    def test_settings_that_are_none(self, text: str, tmp_path: Path) -> None:
        factors = {f"base_model.model.{FIRST}.lora_A.weight": torch.ones(2, 768)}
        factors |= {f"base_model.model.{FIRST}.lora_B.weight": torch.ones(32, 2)}
        save_file(factors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ConceptFileError, match=r"adapter_model\.safetensors"):
            open_concept(tmp_path / "adapter_model.safetensors")


def factors_of(layers: list[str], rank: int = 2) -> dict[str, Tensor]:
    """A kohya file that changes the layers of the tiny UNet by their diffusers' paths."""
    draw = torch.Generator().manual_seed(2)
    named = {}
    for path in layers:
        name = kohya_name(layer_of(path) or "", diffusers_blocks=True)
        width = 32 if "to_q" in path or "to_out" in path else 768
        named[f"{name}.lora_up.weight"] = torch.randn(32, rank, generator=draw)
        named[f"{name}.lora_down.weight"] = torch.randn(rank, width, generator=draw)
    return named


class TestEveryTensorIsAccountedFor:
    VALUE = FIRST.replace("to_k", "to_v")

    def _open(self, extra: dict[str, Tensor], folder: Path, base: BaseModel | None = None) -> Any:
        save_file(factors_of([FIRST]) | extra, folder / "a.safetensors")
        return open_concept(folder / "a.safetensors", base)

    @pytest.mark.parametrize("end", ["oft_R.weight", "hada_x", "lora_E", "w1", "vera_lambda_b"])
    def test_half_of_the_projections_in_a_form_nobody_knows_is_refused(
        self, end: str, tmp_path: Path
    ) -> None:
        extra = {f"unet.{self.VALUE}.{end}": torch.ones(4, 4)}
        with pytest.raises(ConceptFileError, match=re.escape(end)):
            self._open(extra, tmp_path)

    def test_other_layers_are_counted_by_kind(self, tmp_path: Path) -> None:
        extra = {
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(8, 2),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 8),
            "lora_unet_mid_block_resnets_0_conv1.oft_blocks": torch.ones(2, 2, 2),
            "something.else": torch.ones(3),
        }
        opened = self._open(extra, tmp_path)
        assert opened.facts == ("2 of the 6 tensors in the file are used",)
        assert "1 modules of text encoders" in opened.notes[0]
        assert "2 modules that are not cross-attention" in opened.notes[1]
        assert len(opened.notes) == 2

    def test_a_bias_is_left_out_and_said(self, tmp_path: Path) -> None:
        """As ComfyUI's own TrainLoraNode and LoraSave write them."""
        out = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_out.0"
        extra = {
            f"{out}.diff_b": torch.ones(32),
            f"{out}.lora_up.weight": torch.ones(32, 1),
            f"{out}.lora_down.weight": torch.ones(1, 32),
            f"{out}.alpha": torch.tensor(1.0),
            "diffusion_model.input_blocks.1.1.transformer_blocks.0.norm2.diff": torch.ones(32),
            "diffusion_model.input_blocks.1.1.transformer_blocks.0.norm2.diff_b": torch.ones(32),
        }
        opened = self._open(extra, tmp_path)
        assert len(opened.concept.deltas) == 2
        assert opened.facts == ("5 of the 8 tensors in the file are used",)
        assert "1 biases" in opened.notes[0] and "diff_b" in opened.notes[0]

    def test_archives_too(self, tmp_path: Path) -> None:
        layer = f"{FIRST}.weight"
        state = {layer: {"u": torch.ones(32, 2), "v": torch.ones(2, 768)}}
        values = {
            "unet": state,
            "modifier_token": {"<a>": torch.ones(768)},
            "extra": [torch.ones(3)],
        }
        torch.save(values, tmp_path / "delta.bin")
        opened = open_concept(tmp_path / "delta.bin")
        assert opened.facts == ("3 of the 4 tensors in the file are used",)
        assert opened.notes == ("1 tensors that no reader knows were left out, extra/0 for one",)

    def test_one_layer_under_two_names_is_refused(self, tmp_path: Path) -> None:
        extra = {
            f"unet.{FIRST}.lora_B.weight": torch.ones(32, 2),
            f"unet.{FIRST}.lora_A.weight": torch.ones(2, 768),
        }
        with pytest.raises(ConceptFileError, match="under two names"):
            self._open(extra, tmp_path)

    def test_the_old_processors_output(self, tmp_path: Path) -> None:
        place = FIRST.replace("to_k", "processor.to_out_lora")
        extra = {f"{place}.up.weight": torch.ones(32, 2), f"{place}.down.weight": torch.ones(2, 32)}
        opened = self._open(extra, tmp_path)
        assert not opened.notes
        assert any(layer.endswith("to_out.0") for layer in opened.concept.deltas)

    def test_a_lora_in_a_state_dict(self, tmp_path: Path) -> None:
        torch.save({"state_dict": factors_of([FIRST]), "epoch": 3}, tmp_path / "a.ckpt")
        opened = open_concept(tmp_path / "a.ckpt")
        assert len(opened.concept.deltas) == 1
        assert opened.facts == ("2 of the 2 tensors in the file are used",)


def test_ia3_scales_rows_and_columns_of_the_base(base: BaseModel, tmp_path: Path) -> None:
    keys, values = FIRST, FIRST.replace("to_k", "to_v")
    layers = [layer_of(path) or "" for path in (keys, values)]
    rows, columns = torch.randn(32), torch.randn(768)
    names = [kohya_name(layer, diffusers_blocks=True) for layer in layers]
    tensors = {
        f"{names[0]}.weight": rows,
        f"{names[0]}.on_input": torch.tensor(0),
        f"{names[1]}.weight": columns,
        f"{names[1]}.on_input": torch.tensor(1),
    }
    save_file(tensors, tmp_path / "ia3.safetensors")
    with pytest.raises(ConceptFileError, match="IA3.*Give the base model"):
        open_concept(tmp_path / "ia3.safetensors")
    opened = open_concept(tmp_path / "ia3.safetensors", base)
    first, second = (base.weights[layer] for layer in layers)
    assert torch.equal(opened.concept.deltas[layers[0]].dense(), rows.diag() @ first)
    assert torch.allclose(opened.concept.deltas[layers[1]].dense(), second @ columns.diag())
    assert opened.concept.base_hash == base.hash and not opened.notes


class TestStrength:
    @pytest.mark.parametrize("alpha", [4000.0, 1e-4, -2.0, 3.0])
    def test_it_is_exact_and_survives_half_precision(self, alpha: float, tmp_path: Path) -> None:
        draw = torch.Generator().manual_seed(1)
        up = (30 * torch.randn(32, 4, generator=draw)).half()
        down = (0.1 * torch.randn(4, 768, generator=draw)).half()
        name = kohya_name(layer_of(FIRST) or "", diffusers_blocks=True)
        tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        tensors |= {f"{name}.alpha": torch.tensor(alpha)}
        save_file(tensors, tmp_path / "a.safetensors")
        expected = (alpha / 4) * (up.double() @ down.double()).float()
        concept = open_concept(tmp_path / "a.safetensors").concept
        (delta,) = concept.deltas.values()
        assert isinstance(delta, LowRankDelta)
        assert (delta.dense() - expected).norm() < 1e-5 * expected.norm()
        write_concept(concept, tmp_path / "own.safetensors")
        (kept,) = read_concept(tmp_path / "own.safetensors").deltas.values()
        assert (kept.dense() - expected).norm() < 2e-3 * expected.norm()

    def test_more_factors_than_the_layer_has_rows_are_read(self, tmp_path: Path) -> None:
        """As of a LoRA that was trained with one large rank for all layers."""
        tensors = factors_of([FIRST], rank=40)
        up, down = tensors.values()
        save_file(tensors, tmp_path / "a.safetensors")
        (delta,) = open_concept(tmp_path / "a.safetensors").concept.deltas.values()
        assert torch.equal(delta.dense(), up @ down)

    def test_a_file_that_does_nothing_says_so(self, tmp_path: Path) -> None:
        tensors = factors_of([FIRST])
        tensors |= {next(iter(tensors)).replace("lora_up.weight", "alpha"): torch.tensor(0.0)}
        save_file(tensors, tmp_path / "a.safetensors")
        assert "does nothing" in open_concept(tmp_path / "a.safetensors").notes[0]

    @pytest.mark.parametrize("alpha", [[float("inf")], [float("nan")], [1.0, 2.0]])
    def test_an_alpha_that_is_none(self, alpha: list[float], tmp_path: Path) -> None:
        tensors = factors_of([FIRST])
        tensors |= {next(iter(tensors)).replace("lora_up.weight", "alpha"): torch.tensor(alpha)}
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(ConceptFileError, match="its alpha"):
            open_concept(tmp_path / "a.safetensors")

    def test_factors_in_whole_numbers_are_refused(self, tmp_path: Path) -> None:
        tensors = {name: t.to(torch.int8) for name, t in factors_of([FIRST]).items()}
        tensors |= {next(iter(tensors)).replace("lora_up.weight", "alpha"): torch.tensor(1.0)}
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(ConceptFileError, match="int8"):
            open_concept(tmp_path / "a.safetensors")


class TestWords:
    def _bundle(self, folder: Path, **rows: int) -> Any:
        words = {f"bundle_emb.{n}": torch.full((k, 768), float(k)) for n, k in rows.items()}
        save_file(factors_of([FIRST]) | words, folder / "a.safetensors")
        return open_concept(folder / "a.safetensors")

    def test_names_with_dots_are_two_words(self, tmp_path: Path) -> None:
        opened = self._bundle(
            tmp_path, **{"my.cat.string_to_param.*": 1, "my.dog.string_to_param.*": 2}
        )
        assert {t.name: len(t.embeddings["clip_l"]) for t in opened.concept.tokens} == {
            "<my-cat>": 1,
            "<my-dog>": 2,
        }

    def test_names_that_become_one_get_a_number(self, tmp_path: Path) -> None:
        opened = self._bundle(tmp_path, **{"a b.clip_l": 1, "a-b.clip_l": 3, "a.b.clip_l": 2})
        assert len({t.name for t in opened.concept.tokens}) == 3
        assert sorted(len(t.embeddings["clip_l"]) for t in opened.concept.tokens) == [1, 2, 3]
        assert len([note for note in opened.notes if "is called <a-b-" in note]) == 2

    def test_vectors_for_the_encoders_output_are_no_words(self, tmp_path: Path) -> None:
        opened = self._bundle(tmp_path, **{"cat.clip_l": 1, "cat.clip_l_out": 2})
        (token,) = opened.concept.tokens
        assert torch.equal(token.embeddings["clip_l"], torch.ones(1, 768))
        assert "output" in opened.notes[0]
        pair = {"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}
        output = {f"{name}_out": 2 * rows for name, rows in pair.items()}
        save_file({k: t.clone() for k, t in (pair | output).items()}, tmp_path / "e.safetensors")
        opened = open_concept(tmp_path / "e.safetensors")
        (token,) = opened.concept.tokens
        assert all(torch.equal(token.embeddings[name], rows) for name, rows in pair.items())
        assert "output" in opened.notes[0]
        save_file(output, tmp_path / "o.safetensors")
        with pytest.raises(ConceptFileError, match="output alone"):
            open_concept(tmp_path / "o.safetensors")

    def test_text_encoders_with_unequal_vectors(self, tmp_path: Path) -> None:
        pair = {"clip_l": torch.ones(2, 768), "clip_g": torch.ones(1, 1280)}
        save_file(pair, tmp_path / "e.safetensors")
        with pytest.raises(ConceptFileError, match="as many each"):
            open_concept(tmp_path / "e.safetensors")

    def test_two_embeddings_of_one_name(self, tmp_path: Path) -> None:
        torch.save(
            {"string_to_param": {"*": torch.ones(768), "+": torch.ones(768)}}, tmp_path / "e.pt"
        )
        with pytest.raises(ConceptFileError, match="two embeddings"):
            open_concept(tmp_path / "e.pt")

    def test_two_words_in_one_archive(self, tmp_path: Path) -> None:
        words = {"cat-toy": torch.ones(768), "other": torch.zeros(2, 768)}
        torch.save(words, tmp_path / "e.bin")
        tokens = open_concept(tmp_path / "e.bin").concept.tokens
        assert [(t.name, len(t.embeddings["clip_l"])) for t in tokens] == [
            ("<cat-toy>", 1),
            ("<other>", 2),
        ]

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({"emb_params": torch.ones(1, 4, 768)}, r"emb_params has shape \(1, 4, 768\)"),
            ({"emb_params": torch.ones(4, 4096)}, r"emb_params has shape \(4, 4096\)"),
            ({"clip_g": torch.ones(2, 1280)}, r"768 and 1280 \(Stable Diffusion XL\)"),
            ({"clip_l": torch.ones(2, 768), "t5xxl": torch.ones(2, 4096)}, "no concept"),
            ({"clip_l": torch.ones(2, 768), "clip_h": torch.ones(2, 1024)}, "no concept"),
        ],
    )
    def test_embeddings_that_no_model_here_reads(
        self, tensors: dict[str, Tensor], message: str, tmp_path: Path
    ) -> None:
        save_file(tensors, tmp_path / "e.safetensors")
        with pytest.raises(ConceptFileError, match=message):
            open_concept(tmp_path / "e.safetensors")

    def test_the_first_scripts_for_pivotal_tuning(self, tmp_path: Path) -> None:
        pair = {"text_encoders_0": torch.ones(2, 768), "text_encoders_1": torch.ones(2, 1280)}
        save_file(pair, tmp_path / "embeddings.pti")
        (token,) = open_concept(tmp_path / "embeddings.pti").concept.tokens
        assert token.name == "<embeddings>" and len(token.embeddings["clip_g"]) == 2

    def test_a_parameter_of_a_network_is_no_word(self, tmp_path: Path) -> None:
        name = "control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
        save_file({name: torch.ones(32, 768)}, tmp_path / "c.safetensors")
        with pytest.raises(ConceptFileError, match="a ControlNet"):
            open_concept(tmp_path / "c.safetensors")


class TestWordsBesideHuggingFacesWeights:
    def _weights(self, base: BaseModel, folder: Path) -> Path:
        state = {
            f"{hugging_face_name(layer)}.weight": weight + 0.01 * weight.std()
            for layer, weight in base.weights.items()
            if layer.endswith(("to_k", "to_v"))
        }
        path = folder / "pytorch_custom_diffusion_weights.bin"
        torch.save(state, path)
        return path

    def test_only_words_of_these_weights_are_taken(self, base: BaseModel, tmp_path: Path) -> None:
        path = self._weights(base, tmp_path)
        torch.save({"<new1>": torch.ones(768)}, tmp_path / "<new1>.bin")
        torch.save({"<new2>": torch.ones(768)}, tmp_path / "new2.bin")
        torch.save({"<cat-toy>": torch.ones(768)}, tmp_path / "learned_embeds.bin")
        pair = {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}
        save_file(pair, tmp_path / "xl.safetensors")
        torch.save({"<new3>": torch.ones(1024)}, tmp_path / "new3.bin")
        (tmp_path / "<new4>.bin").write_bytes(b"<!doctype html>")
        opened = open_concept(path, base)
        assert [token.name for token in opened.concept.tokens] == ["<new1>", "<new2>"]
        assert any("new3.bin" in note and "1024" in note for note in opened.notes)
        assert any("<new4>.bin" in note and "web page" in note for note in opened.notes)
        assert len(opened.notes) == 2

    def test_a_word_that_is_replaced_is_noticed(self, base: BaseModel, tmp_path: Path) -> None:
        path = self._weights(base, tmp_path)
        torch.save({"<new1>": torch.ones(768)}, tmp_path / "<new1>.bin")
        assert tmp_path / "<new1>.bin" in companions(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "truncated"),
        (b"\x1f\x8b\x08\0" * 9, "gzip"),
        (b"GGUF" + bytes(20), "GGUF"),
        (b"\x89PNG\r\n\x1a\n" + bytes(9), "picture"),
        (b"\x80\x02}q\0.", "bare pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "LFS"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b'{"error":"Unauthorized"}', "JSON"),
        (b"hello, world of text", "begins with"),
    ],
)
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_what_a_file_is_is_said(content: bytes, what: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content)
    with pytest.raises(ConceptFileError, match=what) as caught:
        open_concept(path)
    if what in ("gzip", "GGUF", "picture"):
        with pytest.raises(ConceptFileError, match=f"{what}.*Give the whole model"):
            read_base(path)
    assert "\x1b" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert ("pickle" in str(caught.value)) == (what == "bare pickle")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_of_anything_is_to_be_unpacked(method: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.safetensors", "w", method) as archive:
        archive.writestr("my cat.safetensors", b"x" * 1000)
    with pytest.raises(ConceptFileError, match=r"holds my cat\.safetensors. Unpack it") as caught:
        open_concept(tmp_path / "a.safetensors")
    assert "run code" not in str(caught.value)


def test_a_strong_dora_is_no_other_models(base: BaseModel, tmp_path: Path) -> None:
    layer = layer_of(FIRST) or ""
    tensors = factors_of([FIRST])
    norms = base.weights[layer].norm(dim=1, keepdim=True)
    tensors[f"{kohya_name(layer, diffusers_blocks=True)}.dora_scale"] = 3 * norms
    save_file(tensors, tmp_path / "a.safetensors")
    opened = open_concept(tmp_path / "a.safetensors", base)
    share = opened.concept.deltas[layer].dense().norm() / base.weights[layer].norm()
    assert share > 1 and f"by {share:.1%} of their norm" in opened.facts[1]


def test_how_far_the_base_was_is_said(base: BaseModel, tmp_path: Path) -> None:
    state = {
        f"{layer_to_diffusers(layer)}.weight": 1.03 * weight
        for layer, weight in base.weights.items()
        if layer.endswith(("to_k", "to_v"))
    }
    torch.save({"unet": state}, tmp_path / "delta.bin")
    opened = open_concept(tmp_path / "delta.bin", base)
    assert "by 3.0% of their norm" in opened.facts[1]
    assert opened.concept.provenance["distance_from_base"] == pytest.approx(0.03, rel=1e-3)
