"""Checkpoints in one file are read without a network, and give what a folder with the same weights
gives; what is no such checkpoint is refused in a sentence.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.errors import CustomDiffusionError, IncompatibleModelError
from custom_diffusion.formats.base import read_base
from custom_diffusion.host.diffusers.lending import borrowed_models, text_encoder
from custom_diffusion.host.diffusers.loading import load_pipeline
from safetensors.torch import load_file, save_file
from support.original_names import checkpoint_tensors, small_pipeline, write_checkpoint
from support.tiny_models import same_state, state

FAMILIES = ("sd15", "sd2", "sdxl")
PROMPT = "Photo of a cat, don't  LOOK: naïve ☃"
UNET = "model.diffusion_model."
VELOCITY_BIAS = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """(a checkpoint, a folder with the same weights, the pipeline they come from)"""
    place = tmp_path_factory.mktemp(request.param)
    pipeline = small_pipeline(request.param)
    pipeline.save_pretrained(place / "folder")
    tensors = checkpoint_tensors(pipeline, request.param)
    return write_checkpoint(place / "one.safetensors", tensors), place / "folder", pipeline


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return checkpoint_tensors(small_pipeline("sd15"), "sd15")


def parts(pipeline: Any) -> list[Any]:
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    return [getattr(pipeline, name) for name in names if hasattr(pipeline, name)]


def test_a_checkpoint_is_the_folder_with_the_same_weights(both: tuple[Path, Path, Any]) -> None:
    file, folder, _ = both
    ours, theirs = load_pipeline(file), load_pipeline(folder)
    assert type(ours) is type(theirs)
    assert same_state(state(*parts(theirs)), *parts(ours))
    assert torch.equal(ours.scheduler.alphas_cumprod, theirs.scheduler.alphas_cumprod)
    assert ours.vae.config.scaling_factor == theirs.vae.config.scaling_factor
    encoders = text_encoder(ours), text_encoder(theirs)
    ids = [one.pad([one.tokenize(PROMPT), one.tokenize("")]) for one in encoders]
    assert torch.equal(*ids)
    with torch.no_grad():
        features = [one.encode_with_pooled(i) for one, i in zip(encoders, ids, strict=True)]
    assert torch.equal(features[0].context, features[1].context)
    assert read_base(file).hash == read_base(folder).hash
    with borrowed_models(ours) as own, borrowed_models(theirs) as other:
        drawn = [predicted(one.denoiser, features[0]) for one in (own, other)]
    assert torch.equal(*drawn)


def predicted(denoiser: Any, text: Any) -> torch.Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)
    with torch.no_grad():
        result: torch.Tensor = denoiser.predict(
            latents, torch.tensor([3, 700]), text.context, text.pooled, sizes
        )
    return result


def test_diffusers_reads_the_same_from_it(both: tuple[Path, Path, Any]) -> None:
    file, folder, pipeline = both
    theirs = type(pipeline).from_single_file(
        str(file), config=str(folder), local_files_only=True, safety_checker=None
    )
    assert same_state(state(*parts(theirs)), *parts(load_pipeline(file)))


def test_half_precision_and_averaged_weights_beside_are_read(
    sd15: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    halved = {name: weight.half() for name, weight in sd15.items()}
    halved |= {
        f"model_ema.{n.replace('.', '')}": w for n, w in halved.items() if n.startswith(UNET)
    }
    halved["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[
        None
    ]
    loaded = load_pipeline(write_checkpoint(tmp_path / "half.safetensors", halved))
    assert {p.dtype for part in parts(loaded) for p in part.parameters()} == {torch.float32}
    name = "time_embed.0.weight"
    assert torch.equal(loaded.unet.time_embedding.linear_1.weight, halved[UNET + name].float())


def test_older_text_encoders_lack_a_part_of_their_names(
    sd15: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    old = {name.replace(".text_model.", "."): weight for name, weight in sd15.items()}
    new, old_one = (
        load_pipeline(write_checkpoint(tmp_path / f"{number}.safetensors", tensors))
        for number, tensors in enumerate((sd15, old))
    )
    assert same_state(state(new.text_encoder), old_one.text_encoder)


# What it predicts


@pytest.mark.parametrize(
    ("keys", "metadata", "asked", "prediction", "final"),
    [
        ((), {}, None, "epsilon", 0.00466),
        (("v_pred",), {}, None, "v_prediction", 0.00466),
        (("v_pred", "ztsnr"), {}, None, "v_prediction", 0.0),
        ((), {"modelspec.prediction_type": "v"}, None, "v_prediction", 0.00466),
        ((), {"modelspec.prediction_type": "epsilon"}, None, "epsilon", 0.00466),
        ((), {}, "v", "v_prediction", 0.00466),
        ((), {}, "v-ztsnr", "v_prediction", 0.0),
        (("v_pred", "ztsnr"), {}, "epsilon", "epsilon", 0.00466),
    ],
)
def test_the_prediction_is_what_is_asked_for_or_what_the_file_says(
    sd15: dict[str, torch.Tensor],
    tmp_path: Path,
    keys: tuple[str, ...],
    metadata: dict[str, str],
    asked: Any,
    prediction: str,
    final: float,
) -> None:
    marked = sd15 | {key: torch.zeros(0) for key in keys}
    file = write_checkpoint(tmp_path / "model.safetensors", marked, metadata)
    scheduler = load_pipeline(file, prediction=asked).scheduler
    assert scheduler.config.prediction_type == prediction
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(final, abs=1e-5)


@pytest.mark.parametrize(("deviation", "prediction"), [(0.2, "v_prediction"), (0.01, "epsilon")])
def test_of_sd2_the_weights_tell_and_a_note_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, deviation: float, prediction: str
) -> None:
    tensors = checkpoint_tensors(small_pipeline("sd2"), "sd2")
    tensors[VELOCITY_BIAS] = deviation * torch.tensor([1.0, -1.0]).repeat(32)
    file = write_checkpoint(tmp_path / "sd2.safetensors", tensors)
    with caplog.at_level(logging.INFO, "custom_diffusion"):
        assert load_pipeline(file).scheduler.config.prediction_type == prediction
    (note,) = (one.getMessage() for one in caplog.records if one.name == "custom_diffusion")
    assert "does not say what it predicts" in note and "--prediction" in note
    caplog.clear()
    assert load_pipeline(file, prediction="v").scheduler.config.prediction_type == "v_prediction"
    assert "custom_diffusion" not in {one.name for one in caplog.records}


# Bad files


def lora(_: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"lora_unet_down_blocks_0_attn2_to_k.lora_down.weight": torch.zeros(4, 768)}


def concept(_: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.diff": torch.zeros(2)}


def sd3(_: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{UNET}joint_blocks.0.context_block.attn.qkv.weight": torch.zeros(2, 2)}


def flux(_: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}


def without(prefix: str) -> Any:
    def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: weight for name, weight in tensors.items() if not name.startswith(prefix)}

    return cut


def inpainting(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = f"{UNET}input_blocks.0.0.weight"
    return tensors | {name: torch.zeros(64, 9, 3, 3)}


def scaled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {f"{UNET}scaled_fp8": torch.zeros(2)}


def edm(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"edm_mean": torch.zeros(4), "edm_std": torch.zeros(4)}


def vae_of_16_channels(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"first_stage_model.decoder.conv_in.weight": torch.zeros(64, 16, 3, 3)}


def one_weight_short(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return without(f"{UNET}middle_block.2.in_layers.0.weight")(tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lora, "is a LoRA. Needed is a whole checkpoint.*checkpoint that it belongs to"),
        (concept, "is a concept or a LoRA. Needed is"),
        (sd3, "is SD 3, Flux or the like.*Needed is a whole checkpoint of SD 1.x"),
        (flux, "is SD 3, Flux or the like"),
        (without("cond_stage_model"), "holds no text encoder. Needed is.*Download the full"),
        (without("first_stage_model"), "holds no VAE that encodes pictures. Needed is"),
        (without(UNET), "holds no UNet. Needed is"),
        (inpainting, "9 input channels.*inpainting. Load the text-to-image checkpoint"),
        (scaled, "8 bits with scales"),
        (edm, "samples by EDM"),
        (vae_of_16_channels, "latents of 16 channels"),
        (one_weight_short, "mid_block.resnets.1.norm1.weight"),
    ],
)
def test_what_is_no_checkpoint_of_a_known_family_is_refused_in_a_sentence(
    sd15: dict[str, torch.Tensor], tmp_path: Path, change: Any, message: str
) -> None:
    file = write_checkpoint(tmp_path / "model.safetensors", change(sd15))
    with pytest.raises(IncompatibleModelError, match=f"(?s){message}") as caught:
        load_pipeline(file)
    assert str(file) in str(caught.value)


def test_a_truncated_file_and_a_pickle_and_nothing_are_refused(
    sd15: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = write_checkpoint(tmp_path / "model.safetensors", sd15)
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    with pytest.raises(IncompatibleModelError, match=r"end is missing.*Copy or download it again"):
        load_pipeline(file)
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(pickle.dumps({"state_dict": {}}))
    with pytest.raises(IncompatibleModelError, match=r"is a pickle.*not.*\.safetensors"):
        load_pipeline(pickled)
    pickled.rename(tmp_path / "renamed.safetensors")
    with pytest.raises(IncompatibleModelError, match="it is a pickle"):
        load_pipeline(tmp_path / "renamed.safetensors")
    with pytest.raises(IncompatibleModelError, match="There is no model .*none"):
        load_pipeline(tmp_path / "none")


# Hugging Face's cache


def test_a_folder_of_the_cache_is_its_newest_snapshot(
    sd15: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Files there are links to blobs, and older snapshots stay."""
    pipeline = small_pipeline("sd15")
    cache = tmp_path / "models--somebody--sd"
    pipeline.save_pretrained(tmp_path / "saved")
    for number, file in enumerate(p for p in (tmp_path / "saved").rglob("*") if p.is_file()):
        blob = cache / "blobs" / str(number)
        link = cache / "snapshots" / "new" / file.relative_to(tmp_path / "saved")
        for place in (blob, link):
            place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    old = cache / "snapshots" / "old"
    old.mkdir()
    os.utime(old, (1, 1))
    loaded = load_pipeline(cache)
    assert same_state(state(*parts(pipeline)), *parts(loaded))
    assert read_base(cache).hash == read_base(cache / "snapshots" / "new").hash
    shutil.rmtree(cache / "snapshots")
    (cache / "snapshots").mkdir()
    with pytest.raises(CustomDiffusionError, match="without a snapshot.*Download the model again"):
        load_pipeline(cache)


def test_a_folder_that_holds_checkpoints_names_one(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "v1-5.safetensors")
    assert load_file(tmp_path / "v1-5.safetensors")
    with pytest.raises(IncompatibleModelError, match=r"no model_index.json.*v1-5\.safetensors"):
        load_pipeline(tmp_path)


def test_a_folder_says_itself_what_it_predicts(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleModelError, match="scheduler_config.json says"):
        load_pipeline(tmp_path, prediction="v")
