"""Watching the cross-attention of a pipeline's UNet while pictures of one prompt are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ...attention.maps import AttentionError, AttentionRecorder, WatchedWord
from ...concept.prompts import own_positions
from ..clip.chunks import Encoder, words_of


@contextmanager
def watching(pipeline: Any, words: Sequence[WatchedWord]) -> Iterator[AttentionRecorder]:
    """Records what `host.diffusers.sampling.sample` draws, with all its prompts the same: the first
    half of each batch has the prompt, the other the empty one.
    """
    recorder = AttentionRecorder(words)
    last = len(pipeline.scheduler.alphas_cumprod) - 1

    def begins(module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        latents, timesteps = args[:2]
        recorder.size = (latents.shape[-2], latents.shape[-1])
        recorder.rows = range(len(latents) // 2)
        recorder.progress = 1 - float(timesteps[0]) / last

    with ExitStack() as hooks:
        handle = pipeline.unet.register_forward_pre_hook(begins, with_kwargs=True)
        hooks.callback(handle.remove)
        for path, module in pipeline.unet.named_modules():
            if path.endswith(".attn2"):
                handle = module.register_forward_hook(recorder.hook, with_kwargs=True)
                hooks.callback(handle.remove)
        yield recorder


def watched_words(encoder: Encoder, prompt: str, words: Sequence[str]) -> list[WatchedWord]:
    """Where words stand in a prompt. Raises AttentionError for one that it does not have."""
    token_ids, places = words_of(prompt, encoder)
    watched = []
    for word in words:
        found = own_positions(token_ids, encoder.tokenize_words(word), [])
        if not found:
            raise AttentionError(f"{word!r} is not in the prompt {prompt[:80]!r}.")
        watched.append(WatchedWord(word, [places[i] for i in found]))
    return watched
