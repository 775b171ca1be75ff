"""Watching the cross-attention of a MODEL while ComfyUI samples with it.

Hooks at the network's cross-attention last as long as a sampling. The conditioning that is watched
carries the key of its node, so among the prompts of a batch its pictures are known.
"""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from typing import Any

import comfy.conds
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...attention.maps import AttentionError, AttentionRecorder, WatchedWord
from ...concept.errors import IncompatibleModelError
from ...concept.prompts import own_positions, split_at_tokens
from .marking import Words
from .models.text import encoder_names
from .timed_clip import PLAIN
from .tokenizer import known_tokens

WATCHED = "custom_diffusion_watched"
"""In a conditioning: the key of the node that watches it"""


def watch_attention(
    model: Any, clip: Any, prompt: str, words: str
) -> tuple[Any, Any, AttentionRecorder]:
    """A MODEL that records, the CONDITIONING of the prompt, and what is recorded with both.

    `words` are divided by commas or lines; without any they are the trigger words of the prompt,
    each with the word behind it.
    """
    if not any(name.endswith(".attn2") for name, _ in model.model.diffusion_model.named_modules()):
        raise IncompatibleModelError(
            "This MODEL has no cross-attention to watch. Stable Diffusion 1.x, 2.x and XL have it."
        )
    recorder = AttentionRecorder(_watched(clip, prompt, words))
    watch = Watch(recorder)
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    marked = [
        [features, more if more.get(PLAIN) else {**more, WATCHED: watch.key}]
        for features, more in conditioning
    ]
    return watch.on(model), marked, recorder


def _watched(clip: Any, prompt: str, words: str) -> list[WatchedWord]:
    """Raises AttentionError for a word that the prompt does not have."""
    name = encoder_names(clip)[0]
    tokenizer = getattr(clip.tokenizer, name)
    reader = Words.of(tokenizer, name, {})
    named = [word.strip() for word in words.replace(",", "\n").splitlines() if word.strip()]
    named = named or _trigger_words(prompt, tokenizer)
    if not named:
        raise AttentionError(
            "No words to watch: the prompt has no trigger word that this CLIP knows. Name words of "
            "the prompt, one a line, or connect the CLIP that comes out of Apply Concept."
        )
    content, places = reader.content(clip.tokenize(prompt)[reader.name])
    watched = []
    for word in dict.fromkeys(named):
        own, _ = reader.content(clip.tokenize(word)[reader.name])
        found = [places[i] for i in own_positions(content, own, [])]
        if not found:
            raise AttentionError(
                f"{word!r} is not in the prompt {prompt[:80]!r}. Watch words as they are written "
                "there."
            )
        watched.append(WatchedWord(word, found))
    return watched


def _trigger_words(prompt: str, tokenizer: Any) -> list[str]:
    """Each trigger word of a prompt with the word behind it: "<new1> cat"."""
    known = known_tokens(tokenizer)
    pieces = split_at_tokens(prompt, known)
    found = []
    for piece, behind in zip(pieces, [*pieces[1:], ""], strict=True):
        if piece in known:
            noun = "".join(c if c.isalnum() else " " for c in behind).split()
            found.append(f"{piece} {noun[0]}" if noun and behind[:1] == " " else piece)
    return found


class Watch:
    """One node's part in sampling."""

    def __init__(self, recorder: AttentionRecorder) -> None:
        self.recorder = recorder
        self.key = f"{WATCHED}_{uuid.uuid4().hex}"
        self._hooks = ExitStack()
        self._hooked: set[int] = set()
        self._sigmas: Tensor = torch.zeros(0)

    def on(self, model: Any) -> Any:
        """A clone of the MODEL that records."""
        watched = model.clone()
        watched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, self.key, self.sample)
        watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, self.key, self.predict)
        return watched

    def sample(self, executor: Any, guider: Any, sigmas: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Around a sampler: the watched prompt is told from others, and hooks last as long."""
        self.recorder.begin()
        self._sigmas = sigmas.detach().float().cpu()
        conditions = [one for ones in guider.conds.values() for one in ones]
        if any("area" in one for one in conditions if one.get(WATCHED) == self.key):
            raise AttentionError(
                "The watched prompt is limited to an area of the picture, so its attention cannot "
                "be laid over all of it. Take the area away, or watch the prompt of the whole."
            )
        guider.conds = {
            kind: [self._flagged(one) for one in ones] for kind, ones in guider.conds.items()
        }
        with ExitStack() as self._hooks:
            try:
                return executor(guider, sigmas, *args, **kwargs)
            finally:
                self._hooked.clear()
                self.recorder.rows = ()

    def _flagged(self, condition: Any) -> Any:
        flag = torch.tensor([[float(condition.get(WATCHED) == self.key)]])
        given = {**condition["model_conds"], self.key: comfy.conds.CONDRegular(flag)}
        return {**condition, "model_conds": given}

    def predict(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Around a prediction of the network: which rows of its batch are watched."""
        flags = kwargs.pop(self.key, None)
        if flags is None:
            return executor(x, t, *args, **kwargs)
        self._hook(executor.class_obj)
        recorder = self.recorder
        recorder.size = (x.shape[-2], x.shape[-1])
        recorder.rows = flags.flatten().nonzero()[:, 0].tolist()
        done = int((self._sigmas[:-1] > float(t.flatten()[0]) * (1 + 1e-4)).sum())
        recorder.progress = done / max(len(self._sigmas) - 1, 1)
        try:
            return executor(x, t, *args, **kwargs)
        finally:
            recorder.rows = ()

    def _hook(self, model: Any) -> None:
        if id(model) in self._hooked:
            return
        self._hooked.add(id(model))
        for name, module in model.diffusion_model.named_modules():
            if name.endswith(".attn2"):
                handle = module.register_forward_hook(self.recorder.hook, with_kwargs=True)
                self._hooks.callback(handle.remove)
