"""CLIP's text space, against open_clip's own whole model, on random weights."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from custom_diffusion.concept.errors import IncompatibleModelError
from custom_diffusion.host import open_clip_text
from custom_diffusion.host.open_clip_text import MODEL, WEIGHTS, OpenClipText
from open_clip.pretrained import get_pretrained_cfg
from support.tiny_models import TINY_CLIP

NAME = "tiny-test-clip"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    (folder / f"{NAME}.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(NAME)
    path = folder / "weights.pt"
    torch.save(model.state_dict(), path)
    return path


def test_captions_are_embedded_as_by_the_whole_model(weights: Path) -> None:
    captions = [f"photo number {number} of a cat" for number in range(300)]
    ours = OpenClipText(NAME, str(weights))(captions)
    whole = open_clip.create_model(NAME, pretrained=str(weights)).eval()
    with torch.no_grad():
        features = whole.encode_text(open_clip.get_tokenizer(NAME)(captions))
    wanted = features / features.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)
    assert ours.shape == (300, 16)


@pytest.mark.parametrize("causal", [True, False])
def test_captions_of_any_length_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, causal: bool
) -> None:
    """Padding is left out where it changes nothing: not from a model that looks at it."""
    monkeypatch.setattr(open_clip_text, "_BATCH_SIZE", 3)
    name = f"tiny-test-clip-{'causal' if causal else 'both-ways'}"
    text = {**TINY_CLIP["text_cfg"], "no_causal_mask": not causal}
    (tmp_path / f"{name}.json").write_text(json.dumps({**TINY_CLIP, "text_cfg": text}))
    open_clip.add_model_config(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = open_clip.create_model(name).eval()
    torch.save(whole.state_dict(), tmp_path / "weights.pt")
    captions = ["a cat on a red sofa", "", "cat", "a cat " * 100, "two dogs!", "snow", "a mug"]
    read: list[int] = []
    embed = OpenClipText(name, str(tmp_path / "weights.pt"))
    embed._clip.transformer.register_forward_pre_hook(lambda _, x: read.append(x[0].shape[1]))
    with torch.no_grad():
        features = whole.encode_text(open_clip.get_tokenizer(name)(captions), normalize=True)
    torch.testing.assert_close(embed(captions), features, atol=1e-5, rtol=0)
    assert read == ([3, 8, 77] if causal else [77, 77, 77])


def test_its_name_follows_the_weights(weights: Path) -> None:
    first = OpenClipText(NAME, str(weights)).name
    copy, other = weights.with_name("copy.pt"), weights.with_name("other.pt")
    copy.write_bytes(weights.read_bytes())
    changed = torch.load(weights, weights_only=True)
    changed["text_projection"][0, 0] += 1
    torch.save(changed, other)
    assert OpenClipText(NAME, str(copy)).name == first
    assert OpenClipText(NAME, str(other)).name != first


def test_the_default_weights_have_the_models_activation() -> None:
    """Others load without an error and mean nothing."""
    trained_with = get_pretrained_cfg(MODEL, WEIGHTS)["quick_gelu"]
    assert trained_with == open_clip.get_model_config(MODEL).get("quick_gelu", False)


@pytest.mark.parametrize("model, file", [("no-such-model", "x"), (NAME, "no-such-weights")])
def test_models_and_weights_that_cannot_be_had_are_named(
    weights: Path, model: str, file: str
) -> None:
    with pytest.raises(IncompatibleModelError, match="list_pretrained"):
        OpenClipText(model, file)


def test_a_file_that_holds_something_else_is_refused(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"no weights")
    with pytest.raises(IncompatibleModelError, match=r"x\.pt"):
        OpenClipText(NAME, str(tmp_path / "x.pt"))
