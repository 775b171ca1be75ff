"""Parts that do not go together are refused by their true names before weights are read, and what
does go together is not.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.cli import main
from custom_diffusion.concept.errors import CustomDiffusionError
from custom_diffusion.formats.base import read_base
from custom_diffusion.host.diffusers import folder as reader
from custom_diffusion.host.diffusers.denoiser import DiffusersLatentEncoder
from custom_diffusion.host.diffusers.folder import read_pipeline
from custom_diffusion.host.diffusers.lending import borrowed_models
from custom_diffusion.host.diffusers.sampling import sample
from custom_diffusion.host.open_clip.vocabulary import END, START, write_vocabulary
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.data.latents import encode_views
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from open_clip.tokenizer import SimpleTokenizer
from support.tiny_models import RESOLUTION, cat_concept, tiny_vae
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture(scope="module")
def good(pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the two files of a tokenizer that every release of transformers has written."""
    folder = tmp_path_factory.mktemp("good")
    pipeline.save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    clip = SimpleTokenizer()
    pieces, merges = [*list(clip.encoder)[:-2], START, END], list(clip.bpe_ranks)
    write_vocabulary(folder / "tokenizer", pieces, merges)
    return folder


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def rebuilt(kind: Any, config: Any, folder: Path, **settings: Any) -> None:
    kind.from_config({**config, "_use_default_values": [], **settings}).save_pretrained(folder)


def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("weights were read before the parts were judged")

    monkeypatch.setattr(reader, "_weights", refuse)


# Tokenizers


def test_a_whole_tokenizer_is_read(copied: Path, tokenizer: CLIPTokenizer) -> None:
    prompt = "photo of a naïve cat"
    assert read_pipeline(copied).tokenizer(prompt).input_ids == tokenizer(prompt).input_ids


def cut_in_half(file: Path) -> None:
    text = file.read_text()
    file.write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: shutil.rmtree(t), "its tokenizer has no tokenizer.json and no vocab.json"),
        (lambda t: [f.unlink() for f in t.iterdir()], "no tokenizer.json and no vocab.json"),
        (lambda t: (t / "merges.txt").unlink(), "no tokenizer.json and no merges.txt"),
        (lambda t: (t / "vocab.json").unlink(), "no tokenizer.json and no vocab.json"),
        (lambda t: (t / "vocab.json").write_text(""), "its vocab.json of the tokenizer is empty"),
        (lambda t: (t / "vocab.json").write_text("{}"), "tokenizer holds 0 pieces of words"),
        (lambda t: cut_in_half(t / "vocab.json"), "its vocab.json of the tokenizer is no JSON"),
        (lambda t: (t / "merges.txt").write_text(""), r"lacks 48\d+ of the 49408 merges"),
        (lambda t: cut_in_half(t / "merges.txt"), r"lacks 23\d+ of the 49408 merges"),
    ],
)
def test_a_tokenizer_that_is_not_whole_is_refused_by_name(
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], Any],
    message: str,
) -> None:
    spoil(copied / "tokenizer")
    no_weights(monkeypatch)
    with pytest.raises(CustomDiffusionError, match=message):
        read_pipeline(copied)


# Networks, text encoders, autoencoders, schedules


def another_unet(folder: Path, pipeline: Any, **settings: Any) -> None:
    rebuilt(UNet2DConditionModel, pipeline.unet.config, folder / "unet", **settings)


def another_vae(folder: Path, pipeline: Any, **settings: Any) -> None:
    rebuilt(AutoencoderKL, pipeline.vae.config, folder / "vae", **settings)


def clip_h(folder: Path) -> None:
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=1024, num_hidden_layers=1, num_attention_heads=16
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")


SPOILT: dict[str, tuple[Callable[[Path, Any], None], str]] = {
    "inpainting": (
        lambda f, p: another_unet(f, p, in_channels=9),
        "9 input channels and 4 output channels.*inpainting",
    ),
    "unCLIP": (
        lambda f, p: another_unet(
            f, p, class_embed_type="projection", projection_class_embeddings_input_dim=64
        ),
        r"'projection' \(class_embed_type\)",
    ),
    "16 channels": (
        lambda f, p: another_vae(f, p, latent_channels=16),
        r"The VAE given \(AutoencoderKL\) makes latents of 16 channels",
    ),
    "4 pixels": (
        lambda f, p: another_vae(
            f,
            p,
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            block_out_channels=[8, 8, 8],
        ),
        "one for 4 x 4 pixels",
    ),
    "CLIP-H": (lambda f, p: clip_h(f), "text features of width 1024; this model is .* 1.x"),
    "EDM": (
        lambda f, p: change(
            f / SCHEDULER, _class_name="EDMEulerScheduler", prediction_type="v_prediction"
        ),
        r"samples by EDM.*CosXL.*\(EDMEulerScheduler\)",
    ),
    "continuous": (
        lambda f, p: change(
            f / SCHEDULER, _class_name="EulerDiscreteScheduler", timestep_type="continuous"
        ),
        r"samples by EDM.*\(EulerDiscreteScheduler\)",
    ),
    "flow": (
        lambda f, p: change(f / SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"),
        "samples by flow matching",
    ),
    "flow sigmas": (
        lambda f, p: change(
            f / SCHEDULER, _class_name="UniPCMultistepScheduler", use_flow_sigmas=True
        ),
        "samples by flow matching",
    ),
    "sample": (
        lambda f, p: change(f / SCHEDULER, prediction_type="sample"),
        "predicts 'sample'; epsilon or v_prediction is needed",
    ),
    "100 levels": (
        lambda f, p: change(f / SCHEDULER, num_train_timesteps=100),
        "1000 noise levels where it has 100",
    ),
    "zero SNR": (
        lambda f, p: change(f / SCHEDULER, rescale_betas_zero_snr=True),
        "zero terminal SNR.*drawn black.*v_prediction",
    ),
    "zero SNR, Euler": (
        lambda f, p: change(
            f / SCHEDULER, _class_name="EulerDiscreteScheduler", rescale_betas_zero_snr=True
        ),
        "zero terminal SNR.*drawn black",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_does_not_fit_is_refused_before_weights_are_read(
    copied: Path, pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spoil, message = SPOILT[name]
    spoil(copied, pipeline)
    no_weights(monkeypatch)
    with pytest.raises(CustomDiffusionError, match=message) as caught:
        read_pipeline(copied)
    assert str(copied) in str(caught.value)
    assert "Download it again" not in str(caught.value)


def test_a_pipeline_that_was_put_together_elsewhere_is_judged_too(
    pipeline: StableDiffusionPipeline, v_pipeline: StableDiffusionPipeline
) -> None:
    def with_parts(**parts: Any) -> StableDiffusionPipeline:
        components = {**pipeline.components, **parts}
        return StableDiffusionPipeline(**components, requires_safety_checker=False)

    settings = {**v_pipeline.scheduler.config, "rescale_betas_zero_snr": True}
    velocity = DDIMScheduler.from_config({**settings, "_use_default_values": []})
    noise = DDIMScheduler.from_config(
        {**settings, "prediction_type": "epsilon", "_use_default_values": []}
    )
    assert float(velocity.alphas_cumprod[-1]) == 0
    with pytest.raises(CustomDiffusionError, match="drawn black"):
        sample(with_parts(scheduler=noise), ["a cat"], resolution=RESOLUTION, steps=2)
    drawn = sample(with_parts(scheduler=velocity), ["a cat"], resolution=RESOLUTION, steps=2)
    assert drawn.isfinite().all()
    assert drawn.std() > 0.01
    with (
        pytest.raises(CustomDiffusionError, match="16 channels"),
        borrowed_models(with_parts(vae=vae_of_16_channels())),
    ):
        pass


def vae_of_16_channels() -> AutoencoderKL:
    return AutoencoderKL.from_config(
        {**tiny_vae().config, "_use_default_values": [], "latent_channels": 16}
    )


# Autoencoders that do not compute


def test_latents_that_are_not_finite_are_the_autoencoders_fault() -> None:
    broken, overflowing = tiny_vae(), tiny_vae()
    with torch.no_grad():
        broken.encoder.conv_in.weight[0, 0, 0, 0] = torch.nan
        for module in overflowing.encoder.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.mul_(1e30)
    config = TrainConfig(resolution=RESOLUTION, views_per_image=1)
    for vae, message in (
        (broken, r"broken: its weight encoder.conv_in.weight holds values that are not finite"),
        (overflowing, r"computes in float32, made latents .* not finite numbers.*another VAE"),
        (
            copy.deepcopy(overflowing).bfloat16(),
            r"too large for bfloat16: train with --precision float32",
        ),
    ):
        with pytest.raises(CustomDiffusionError, match=message) as caught:
            encode_views(cat_concept(1), DiffusersLatentEncoder(vae), config)
        assert "learning rate" not in str(caught.value)


# Rounded weights, devices


def test_a_base_is_read_from_rounded_weights(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline.unet.save_pretrained(tmp_path / "whole" / "unet")
    pipeline.unet.save_pretrained(tmp_path / "rounded" / "unet", variant="fp16")
    pipeline.unet.save_pretrained(
        tmp_path / "divided" / "unet", variant="fp16", max_shard_size="1MB"
    )
    hashes = {read_base(tmp_path / name).hash for name in ("whole", "rounded", "divided")}
    assert len(hashes) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps", "gpu", "meta"])
@pytest.mark.parametrize("command", ["sample --prompt cat", "train --images x --class-noun cat"])
def test_a_device_that_is_not_there_is_refused(
    command: str, device: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = str(tmp_path / "out.safetensors")
    arguments = [*command.split(), "--model", "miniature", "--device", device, "--output", output]
    assert main(arguments) == 1
    shown = capsys.readouterr().err
    assert f"error: --device {device} cannot be used" in shown
    assert "--device cpu" in shown
