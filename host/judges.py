"""Feature models from folders on disk, read as data: CLIP and DINOv2 as transformers writes them,
CLIP as open_clip does.

As with pipelines (`diffusers/folder.py`), classes are fixed, of a configuration only known plain
settings are read, weights are .safetensors alone, and nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..concept.errors import ConfigError, IncompatibleModelError
from ..concept.plain import read_json
from ..concept.regular_files import read_regular
from ..concept.tensors import read_tensors
from ..evaluation.features import WORD, Judge
from ..formats.base import weight_files
from ..pictures.tensors import in_eight_bits
from .diffusers.tokenizer import MOST_JSON_BYTES, read_tokenizer

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_DINO_MEAN, _DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DINO_EDGES = 256, 224
"""To which a picture's shorter side is scaled, and what is cut out of its middle"""
_LAYERS = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("hidden_act", "layer_norm_eps", "projection_dim"),
}
_TEXT = {*_LAYERS, "vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id"}
_VISION = {*_LAYERS, "image_size", "patch_size", "num_channels"}
_DINO = {*_VISION, "mlp_ratio", "qkv_bias", "use_swiglu_ffn", "layerscale_value"}
_OPEN_VISION = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
_OPEN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers"}
_MOST_LAYERS = 64
_OPEN_CONFIG, _OPEN_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_ADVICE = (
    "Download the files of a CLIP (openai/clip-vit-large-patch14, for one: config.json, "
    "model.safetensors, vocab.json, merges.txt), or for likeness alone of a DINOv2 "
    "(facebook/dinov2-base: config.json, model.safetensors) into a folder, and give that. Nothing "
    "is downloaded here."
)


def read_judge(folder: Path, device: str = "cpu") -> Judge:
    """The feature model of a folder, in float32.

    Raises IncompatibleModelError that names the folder, what is wrong, and what to get instead.
    """
    if not os.path.isdir(folder):
        raise IncompatibleModelError(f"There is no folder {folder} of a feature model. {_ADVICE}")
    with _reading(folder):
        if (folder / _OPEN_CONFIG).is_file():
            return _open_clip(folder, device)
        settings = _settings(folder / "config.json")
        readers = {"clip": _clip, "dinov2": _dinov2}
        reader = readers.get(str(settings.get("model_type")))
        if reader is None:
            raise IncompatibleModelError(
                f"it is a {settings.get('model_type')!r}; known are {', '.join(readers)} and "
                f"open_clip's"
            )
        return reader(folder, settings, device)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Whatever an odd folder makes the libraries raise, as a message that names it."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"The feature model {folder} needs a package that is not installed ({error}). Install "
            f"it into the same Python."
        ) from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise IncompatibleModelError(
            f"{folder} could not be loaded as a feature model ({reason}). {_ADVICE}"
        ) from error


def _clip(folder: Path, settings: Mapping[str, Any], device: str) -> Judge:
    from transformers import CLIPConfig, CLIPModel

    text, vision = settings.get("text_config", {}), settings.get("vision_config", {})
    config = CLIPConfig(
        text_config=_known(text, _TEXT),
        vision_config=_known(vision, _VISION),
        projection_dim=settings.get("projection_dim", 512),
    )
    tokenizer = read_tokenizer(folder, config.text_config.vocab_size)
    model = _of_transformers(CLIPModel, config, folder).to(device)

    def image_features(images_bhwc: Tensor) -> Tensor:
        edge = config.vision_config.image_size
        pixels = prepare(images_bhwc.to(device), edge, edge, _CLIP_MEAN, _CLIP_STD)
        found: Tensor = model.visual_projection(model.vision_model(pixel_values=pixels)[1])
        return found

    def text_features(texts: Sequence[str]) -> Tensor:
        length = config.text_config.max_position_embeddings
        tokens = tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        read = model.text_model(tokens.input_ids.to(device), tokens.attention_mask.to(device))
        found: Tensor = model.text_projection(read[1])
        return found

    words = model.text_model.embeddings.token_embedding.weight
    return Judge(f"CLIP {folder.name}", image_features, text_features, _word(words))


def _dinov2(folder: Path, settings: Mapping[str, Any], device: str) -> Judge:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(**_known(settings, _DINO))
    model = _of_transformers(Dinov2Model, config, folder).to(device)

    def image_features(images_bhwc: Tensor) -> Tensor:
        pixels = prepare(images_bhwc.to(device), *_DINO_EDGES, _DINO_MEAN, _DINO_STD)
        found: Tensor = model(pixel_values=pixels)[1]
        return found

    return Judge(f"DINOv2 {folder.name}", image_features)


def _open_clip(folder: Path, device: str) -> Judge:
    from open_clip import CLIP, SimpleTokenizer

    settings = _settings(folder / _OPEN_CONFIG)
    config, pictures = settings.get("model_cfg", {}), settings.get("preprocess_cfg", {})
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    foreign = [k for k in (*vision, *text) if k.startswith(("timm_", "hf_"))]
    if foreign:
        raise IncompatibleModelError(f"it is built of another library's model ({foreign[0]})")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = CLIP(
            embed_dim=config["embed_dim"],
            vision_cfg=_known(vision, _OPEN_VISION),
            text_cfg=_known(text, _OPEN_TEXT),
            quick_gelu=bool(config.get("quick_gelu", False)),
        )
    tensors, _ = read_tensors(folder / _OPEN_WEIGHTS)
    _check_complete(sorted(model.state_dict().keys() - tensors.keys()))
    model.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
    model.attn_mask = torch.full((text["context_length"],) * 2, -torch.inf).triu_(1)
    model = model.to(device).requires_grad_(False).train(False)
    tokenize = SimpleTokenizer(context_length=text["context_length"])
    mean, std = pictures.get("mean", _CLIP_MEAN), pictures.get("std", _CLIP_STD)

    def image_features(images_bhwc: Tensor) -> Tensor:
        edge = vision["image_size"]
        found: Tensor = model.encode_image(
            prepare(images_bhwc.to(device), edge, edge, mean, std), normalize=False
        )
        return found

    def text_features(texts: Sequence[str]) -> Tensor:
        found: Tensor = model.encode_text(tokenize(list(texts)).to(device), normalize=False)
        return found

    words = model.token_embedding.weight
    return Judge(f"open_clip {folder.name}", image_features, text_features, _word(words))


def prepare(
    images_bhwc: Tensor, shorter: int, edge: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Pictures in 0..1 as these models read them, (b, 3, edge, edge): scaled until their shorter
    side is `shorter`, cut out of the middle, in 256 shades.
    """
    images = images_bhwc.movedim(-1, 1)
    height, width = images.shape[2:]
    scale = shorter / min(height, width)
    size = (max(edge, round(height * scale)), max(edge, round(width * scale)))
    if size != (height, width):
        images = F.interpolate(images, size, mode="bicubic", antialias=True)
    top, left = (size[0] - edge) // 2, (size[1] - edge) // 2
    images = images[:, :, top : top + edge, left : left + edge]
    images = in_eight_bits(images)
    shift, spread = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (mean, std))
    return (images - shift) / spread


def _of_transformers(kind: Any, config: Any, folder: Path) -> Any:
    """A model of these settings with the folder's weights. Releases differ in what they call some,
    and read the older names. Without a name of a model nothing is looked up.
    """
    model, loaded = kind.from_pretrained(
        None,
        config=config,
        state_dict=_weights(folder),
        output_loading_info=True,
        local_files_only=True,
    )
    missing = sorted(set(loaded["missing_keys"]) - {"embeddings.mask_token"})
    _check_complete([*missing, *map(str, loaded["mismatched_keys"])])
    return model.requires_grad_(False).train(False)


def _check_complete(missing: Sequence[str]) -> None:
    if missing:
        raise IncompatibleModelError(f"it lacks {len(missing)} weights, {missing[0]} for one")


def _settings(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    if not file.is_file():
        raise IncompatibleModelError(f"it has no {file.name}")
    settings = read_json(read_regular(file, MOST_JSON_BYTES).decode())
    if not isinstance(settings, dict):
        raise IncompatibleModelError(f"its {file.name} is no JSON object")
    return settings


def _known(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    layers = settings.get("num_hidden_layers", settings.get("layers", 1))
    if type(layers) is not int or not 0 < layers <= _MOST_LAYERS:
        raise IncompatibleModelError(f"its configuration asks for {layers!r} layers")
    return {name: settings[name] for name in names if name in settings}


def _weights(folder: Path) -> dict[str, Tensor]:
    """In float32, in memory of their own."""
    tensors = [read_tensors(file)[0] for file in weight_files(folder, "model")]
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for part in tensors
        for name, tensor in part.items()
    }


def _word(words: Tensor) -> Tensor | None:
    return words[WORD].float().cpu() if len(words) > WORD else None
