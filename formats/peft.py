"""What PEFT's settings say of a LoRA's scale. They lie in the header of a file that diffusers
wrote, or in `adapter_config.json` beside one that PEFT wrote, and the tensors say nothing of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from ..concept.layers import MOST_LAYERS
from ..concept.plain import read_json
from ..concept.regular_files import read_regular
from .content import Content, container

CONFIG = "adapter_config.json"
_HEADER = "lora_adapter_metadata"
_PREFIXES = ("unet.", "base_model.model.")
_LARGEST_CONFIG = 1 << 20
_MOST_PATTERNS = MOST_LAYERS
_MOST_QUANTIFIERS = 200
"""In all patterns together"""
_LONGEST_PATTERN = 1000
_LONGEST_PATH = 200
_MOST_ALTERNATIVES = 64

_Atoms = tuple[tuple[re.Pattern[str], str], ...]
_ATOM = re.compile(r"(\\[.dw-]|\[\^?[\w.-]+\]|[\w.-])([*+?]?)\??")
_GROUP = re.compile(r"\((?:\?:)?([^()]*)\)")
_DEFAULT = 8
"""`r` and `lora_alpha` where PEFT's settings leave them out"""


@dataclass(frozen=True)
class PeftScale:
    """alpha / rank of each module, or alpha / √rank, as PEFT computes it."""

    alpha: float
    patterns: Mapping[str, float]
    """Regular expression of the end of a module's path → its alpha; the first that fits counts"""
    stabilised: bool
    fixed_rank: int = 0
    """LoKr divides by the rank in the settings, whatever its factors have; 0 elsewhere"""

    def __call__(self, module: str, rank: int) -> float:
        """Of a module by its name in the file. Raises ValueError."""
        path = module
        for prefix in _PREFIXES:
            path = path.removeprefix(prefix)
        if self.patterns and len(path) > _LONGEST_PATH:
            raise ValueError(f"its name has {len(path)} characters")
        own = (a for pattern, a in self.patterns.items() if matches_end(pattern, path))
        divisor = self.fixed_rank or rank
        return next(own, self.alpha) / (math.sqrt(divisor) if self.stabilised else divisor)


def peft_scale(content: Content) -> PeftScale | None:
    """Of a file that has PEFT's settings, None where it has none. Raises ValueError.

    A file of PEFT's own names always has its settings beside it: where they are missing, nothing
    says how strong it is.
    """
    text = content.metadata.get(_HEADER)
    if text is not None:
        settings = _settings(_HEADER, text)
        prefixed = {
            name.removeprefix("unet."): value
            for name, value in settings.items()
            if name.startswith("unet.")
        }
        settings = prefixed or settings
        if not settings.keys() & {"peft_type", "r", "lora_alpha", "alpha"}:
            return None  # those of a text encoder alone
    elif any(name.startswith("base_model.model.") for name in content.values):
        settings = _beside(content.path)
    else:
        return None
    if settings.get("use_dora") and not any("magnitude" in name for name in content.values):
        raise ValueError("its settings say DoRA, and it holds no magnitudes")
    patterns = container(settings.get("alpha_pattern"))
    if len(patterns) > _MOST_PATTERNS:
        raise ValueError(f"its alpha_pattern has {len(patterns)} entries; a model has fewer layers")
    if sum(map("".join(patterns).count, "*+?")) > _MOST_QUANTIFIERS:
        raise ValueError("its alpha_pattern is too intricate")
    kind = settings.get("peft_type", "LORA")
    alpha = settings.get("lora_alpha" if kind == "LORA" else "alpha", _DEFAULT)
    return PeftScale(
        alpha=_number("alpha", alpha),
        patterns={pattern: _number(pattern, a) for pattern, a in patterns.items()},
        stabilised=bool(settings.get("use_rslora")),
        fixed_rank=int(_number("r", settings.get("r", _DEFAULT))) if kind == "LOKR" else 0,
    )


def _beside(weights: Path) -> Mapping[str, Any]:
    try:
        text = read_regular(weights.parent / CONFIG, _LARGEST_CONFIG).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"it is an adapter of PEFT, whose scale is in {CONFIG} beside it, and that cannot be "
            f"read ({error}). Copy both files of the adapter into one folder"
        ) from error
    return _settings(CONFIG, text)


def _settings(what: str, text: str) -> Mapping[str, Any]:
    try:
        settings = read_json(text)
    except ValueError as error:
        raise ValueError(f"{what} is no JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{what} holds no settings")
    return settings


def _number(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"PEFT's setting {what[:100]} is {str(value)[:100]}; a number is needed")
    return float(value)


def matches_end(pattern: str, path: str) -> bool:
    r"""Whether a pattern fits a path from its start, or from behind a dot of it, to its end, as
    `re.match(rf"(.*\.)?({pattern})$", path)` does.

    Not done by `re`, which a stranger's pattern can keep busy for hours: every place in the path
    that a part of the pattern can reach is followed at once. Raises ValueError for patterns of more
    than characters, classes, `* + ?`, one level of groups, and `^`.
    """
    starts = {0} | {place + 1 for place, character in enumerate(path) if character == "."}
    for anchored, atoms in _alternatives(pattern):
        places = {0} if anchored else starts
        for atom, quantifier in atoms:
            places = _follow(atom, quantifier, places, path)
        if len(path) in places:
            return True
    return False


@lru_cache(maxsize=4096)
def _alternatives(pattern: str) -> tuple[tuple[bool, _Atoms], ...]:
    """The pattern's alternatives, those in its groups written out; whether each begins with `^`."""
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError(f"a pattern of its settings has {len(pattern)} characters")
    pieces = _GROUP.split(pattern)  # between groups, and what is in them, in turn
    if len(pieces) == 1:
        return tuple(_parsed(alternative) for alternative in pattern.split("|"))
    if any("|" in piece or piece[:1] in (*"*+?{",) for piece in pieces[::2]):
        raise ValueError(f"the pattern {pattern[:100]!r} of its settings is too intricate")
    choices = [piece.split("|") if n % 2 else [piece] for n, piece in enumerate(pieces)]
    if math.prod(map(len, choices)) > _MOST_ALTERNATIVES:
        raise ValueError(f"the pattern {pattern[:100]!r} has too many alternatives")
    return tuple(_parsed("".join(chosen)) for chosen in product(*choices))


def _parsed(text: str) -> tuple[bool, _Atoms]:
    """Whether it begins with `^`; each character or class, and how often it may come."""
    rest, atoms, place = text.removeprefix("^").removesuffix("$"), [], 0
    while place < len(rest):
        found = _ATOM.match(rest, place)
        if found is None:
            raise ValueError(f"the pattern {text[:100]!r} of its settings is too intricate")
        try:
            atoms.append((re.compile(found[1]), found[2]))
        except re.error as error:
            raise ValueError(f"the pattern {text[:100]!r} of its settings: {error}") from error
        place = found.end()
    return text.startswith("^"), tuple(atoms)


def _follow(atom: re.Pattern[str], quantifier: str, places: set[int], path: str) -> set[int]:
    """Where in the path one may be behind the atom, having been at one of the places before."""

    def step(some: set[int]) -> set[int]:
        return {p + 1 for p in some if p < len(path) and atom.fullmatch(path[p])}

    reached = step(places)
    newest = reached if quantifier in ("*", "+") else set()
    while newest:
        newest = step(newest) - reached
        reached = reached | newest
    return reached | places if quantifier in ("*", "?") else reached
