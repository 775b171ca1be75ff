"""CLIP's text space, against open_clip's own whole model, on random weights."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import open_clip
import pytest
import torch
from custom_diffusion.concept.errors import IncompatibleModelError
from custom_diffusion.host.open_clip import text as open_clip_text
from custom_diffusion.host.open_clip.text import MODEL, MODELS, OpenClipText
from open_clip.pretrained import get_pretrained_cfg
from safetensors.torch import load_file, save_file
from support.tiny_models import TINY_CLIP

NAME = "tiny-test-clip"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    (folder / f"{NAME}.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> open_clip.CLIP:
    """open_clip's own, pictures' half and all."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip.create_model(NAME).eval()


@pytest.fixture(scope="module")
def weights(folder: Path, whole: open_clip.CLIP) -> Path:
    path = folder / "weights.safetensors"
    save_file(whole.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def tiny_model_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip_text, "MODELS", (*MODELS, NAME))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something was looked up on a network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_captions_are_embedded_as_by_the_whole_model(weights: Path, whole: open_clip.CLIP) -> None:
    captions = [f"photo number {number} of a cat" for number in range(300)]
    ours = OpenClipText(NAME, weights)(captions)
    with torch.no_grad():
        features = whole.encode_text(open_clip.get_tokenizer(NAME)(captions))
    wanted = features / features.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)
    assert ours.shape == (300, 16)


def test_captions_of_any_length_keep_their_order(
    weights: Path, whole: open_clip.CLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding is left out, because a causal model does not look at it."""
    monkeypatch.setattr(open_clip_text, "_BATCH_SIZE", 3)
    captions = ["a cat on a red sofa", "", "cat", "a cat " * 100, "two dogs!", "snow", "a mug"]
    read: list[int] = []
    embed = OpenClipText(NAME, weights)
    embed._clip.transformer.register_forward_pre_hook(lambda _, x: read.append(x[0].shape[1]))
    with torch.no_grad():
        features = whole.encode_text(open_clip.get_tokenizer(NAME)(captions), normalize=True)
    torch.testing.assert_close(embed(captions), features, atol=1e-5, rtol=0)
    assert read == [3, 8, 77]


def test_its_name_follows_the_weights(weights: Path) -> None:
    first = OpenClipText(NAME, weights).name
    copy, other = (weights.with_name(f"{name}.safetensors") for name in ("copy", "other"))
    copy.write_bytes(weights.read_bytes())
    changed = load_file(weights)
    changed["text_projection"][0, 0] += 1
    save_file(changed, other)
    assert OpenClipText(NAME, copy).name == first
    assert OpenClipText(NAME, other).name != first


def test_the_process_keeps_its_random_numbers(weights: Path) -> None:
    before = torch.get_rng_state()
    OpenClipText(NAME, weights)
    assert torch.equal(torch.get_rng_state(), before)


def test_openais_weights_have_the_default_models_activation() -> None:
    """Others load without an error and mean nothing."""
    trained_with = get_pretrained_cfg(MODEL, "openai")["quick_gelu"]
    assert trained_with == open_clip.get_model_config(MODEL).get("quick_gelu", False)


@pytest.mark.parametrize("model", MODELS)
def test_every_known_model_is_built_and_read_by_open_clip_alone(model: str) -> None:
    """Its configuration names no other library's model or tokenizer, which would be downloaded."""
    config = open_clip.get_model_config(model)
    assert config.keys() <= {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
    assert set(config["text_cfg"]) == {
        *("context_length", "vocab_size", "width", "heads", "layers")
    }


@pytest.mark.parametrize(
    "model",
    [
        *("no-such-model", "hf-hub:owner/repo", "hf-hub:timm/vit_base_patch32_clip_224.openai"),
        *("local-dir:{}", "{}", "ViT-B-32/../../x", "vit-b-32", "roberta-ViT-B-32", "", "x" * 9999),
    ],
)
def test_other_models_are_refused_and_nothing_of_theirs_is_run(
    weights: Path, tmp_path: Path, model: str
) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    kwargs = {"trust_remote_code": True, "tokenizer_type": "evil"}
    text = {**TINY_CLIP["text_cfg"], "hf_tokenizer_name": str(tmp_path), "tokenizer_kwargs": kwargs}
    config = {"model_cfg": {**TINY_CLIP, "text_cfg": text}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    auto = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(auto))
    with pytest.raises(IncompatibleModelError, match="is not known.*Give one of ViT-B-32") as error:
        OpenClipText(model.format(tmp_path), weights)
    assert len(str(error.value)) < 600
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        (b"no weights", "cannot be read"),
        ({"text_projection": torch.zeros(2, 2)}, "missing"),
        ({"surprise": torch.zeros(2)}, "surprise"),
        ({"text_projection": torch.zeros(32, 17)}, r"\(32, 17\), needed \(32, 16\)"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(
    weights: Path, tmp_path: Path, content: bytes | dict[str, torch.Tensor] | None, message: str
) -> None:
    path = tmp_path / "x.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        known = {} if message == "missing" else load_file(weights)
        save_file({**known, **content}, path)
    with pytest.raises(IncompatibleModelError, match=rf"x\.safetensors.*{message}"):
        OpenClipText(NAME, path)


def test_a_pickle_is_not_opened(whole: open_clip.CLIP, tmp_path: Path) -> None:
    torch.save(whole.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(IncompatibleModelError, match="pickle"):
        OpenClipText(NAME, tmp_path / "x.safetensors")
