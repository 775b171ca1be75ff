"""Feature models from folders, against the libraries that wrote them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from custom_diffusion.concept.errors import IncompatibleModelError
from custom_diffusion.evaluation.features import picture_features, text_features
from custom_diffusion.host.judges import read_judge
from PIL import Image
from safetensors.torch import load_file, save_file
from support.judges import clip_processor, write_clip, write_dinov2, write_open_clip
from torch import Tensor
from transformers import BitImageProcessor

TEXTS = ["a cat", "photo of a dog on the beach, with a red ball", ""]


def pictures(width: int = 96, height: int = 64) -> list[Image.Image]:
    """Smooth ones: how a scaled picture rounds must not matter."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (3, 6, 6, 3), dtype=np.uint8)
    return [Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC) for c in coarse]


def unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)


def first_of(found: Any) -> Tensor:
    """transformers 5 returns more than the features."""
    return found if isinstance(found, Tensor) else found.pooler_output


@torch.no_grad()
def test_clip_of_transformers_sees_and_reads_as_there(tmp_path: Path) -> None:
    model = write_clip(tmp_path)
    judge = read_judge(tmp_path)
    wanted = model.get_image_features(**clip_processor()(pictures(), return_tensors="pt"))
    ours = picture_features(judge, pictures())
    torch.testing.assert_close(ours, unit(first_of(wanted)), atol=5e-3, rtol=0)
    from support.tiny_models import clip_tokenizer

    tokens = clip_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    wanted = model.get_text_features(**tokens)
    read = text_features(judge, TEXTS, ours.shape[1])
    assert read is not None
    torch.testing.assert_close(read, unit(first_of(wanted)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_dinov2_sees_as_in_transformers_and_reads_nothing(tmp_path: Path) -> None:
    model = write_dinov2(tmp_path)
    processor = BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    wanted = model(**processor(pictures(300, 280), return_tensors="pt")).pooler_output
    judge = read_judge(tmp_path)
    torch.testing.assert_close(
        picture_features(judge, pictures(300, 280)), unit(wanted), atol=5e-3, rtol=0
    )
    assert text_features(judge, TEXTS, 32) is None


@torch.no_grad()
def test_open_clip_sees_and_reads_as_there(tmp_path: Path) -> None:
    model = write_open_clip(tmp_path)
    judge = read_judge(tmp_path)
    transform = open_clip.image_transform(32, is_train=False)
    wanted = model.encode_image(torch.stack([transform(one) for one in pictures()]))
    ours = picture_features(judge, pictures())
    torch.testing.assert_close(ours, unit(wanted), atol=5e-3, rtol=0)
    read = text_features(judge, TEXTS, ours.shape[1])
    assert read is not None
    wanted = unit(model.encode_text(open_clip.tokenizer.SimpleTokenizer()(TEXTS)))
    torch.testing.assert_close(read, wanted, atol=1e-5, rtol=0)


def test_the_encoder_that_a_concept_was_trained_with_is_known_again(tmp_path: Path) -> None:
    judge = read_judge_of_clip(tmp_path)
    assert judge.word is not None
    own = judge.compared_with([torch.zeros(1, 8), judge.word.half()[None]])
    assert "with the text encoder of the model that it judges" in own.remarks[0]
    assert judge.compared_with([torch.randn(1, 32), torch.zeros(1, 0)]).remarks == ()


def read_judge_of_clip(folder: Path) -> Any:
    write_clip(folder)
    return read_judge(folder)


def test_a_model_of_two_widths_is_refused(tmp_path: Path) -> None:
    judge = read_judge_of_clip(tmp_path)
    with pytest.raises(
        IncompatibleModelError, match="texts have 16 numbers and those of pictures 7"
    ):
        text_features(judge, TEXTS, 7)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f), "There is no folder"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), "could not be loaded"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "'bert'; known are"),
        (lambda f: changed(f, "num_hidden_layers", 10**9), "1000000000 layers"),
        (lambda f: changed(f, "hidden_size", 10**7), "could not be loaded"),
        (lambda f: without(f, "visual_projection.weight"), "lacks 1 weights, visual_projection"),
    ],
)
def test_an_odd_folder_is_named_with_what_to_get(tmp_path: Path, spoil: Any, message: str) -> None:
    folder = tmp_path / "judge"
    write_clip(folder)
    spoil(folder)
    with pytest.raises(IncompatibleModelError, match=message) as error:
        read_judge(folder)
    assert "Nothing is downloaded" in str(error.value) and str(folder) in str(error.value)


def changed(folder: Path, name: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"][name] = value
    (folder / "config.json").write_text(json.dumps(config))


def without(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("key", ["timm_model_name", "hf_model_name"])
def test_open_clip_of_another_library_is_refused(tmp_path: Path, key: str) -> None:
    """open_clip would look it up on the network."""
    write_open_clip(tmp_path)
    file = tmp_path / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["vision_cfg"][key] = "owner/repository"
    file.write_text(json.dumps(config))
    with pytest.raises(IncompatibleModelError, match=f"another library's model \\({key}"):
        read_judge(tmp_path)
