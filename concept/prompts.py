"""Modifier tokens and prompts: how they are written, split, and which words a merge constrains."""

import re
from collections.abc import Iterable, Sequence

from .errors import TokenError

_MODIFIER_TOKEN = re.compile(r"<[\w-]+>")

DEFAULT_TEMPLATE = "photo of a {}"
STYLE_TEMPLATE = "painting in the style of {}"
KINDS = {"thing": DEFAULT_TEMPLATE, "style": STYLE_TEMPLATE}
"""What a concept can be, and how its captions speak of it."""
CONSTRAINT_TEMPLATES = ("{}", "photo of a {}")
"""Prompts whose features a merge keeps exact, as in the reference (Kumari et al., Eq. 4)."""


def check_modifier_token(token: str) -> str:
    """Returns the token when it is well formed (`<new1>`); raises TokenError otherwise."""
    if not _MODIFIER_TOKEN.fullmatch(token):
        inner = re.sub(r"[^\w-]+", "-", token.strip("<> ")) or "new1"
        raise TokenError(
            f"The trigger word {token!r} would be read as ordinary text. A trigger word is a "
            f"name in angle brackets made of letters, digits, '-' and '_'. Write {f'<{inner}>'!r}, "
            "for example."
        )
    return token


def subject(token: str | None, class_noun: str) -> str:
    """What the concept is called in a prompt: `<new1> cat`, or `cat` where there is no token."""
    return f"{token} {class_noun}".strip() if token else class_noun


def split_at_tokens(text: str, tokens: Iterable[str]) -> list[str]:
    """Splits a text so that every modifier token stands alone; the rest is kept as it is."""
    names = sorted(tokens, key=len, reverse=True)
    if not names:
        return [text] if text else []
    pattern = "(" + "|".join(re.escape(name) for name in names) + ")"
    return [piece for piece in re.split(pattern, text) if piece]


def unknown_words(text: str, known: Iterable[str]) -> list[str]:
    """Every `<word>` of a prompt that is none of the known ones, once each."""
    names = set(known)
    pieces = (piece for piece in split_at_tokens(text, names) if piece not in names)
    return list(dict.fromkeys(word for piece in pieces for word in _MODIFIER_TOKEN.findall(piece)))


def own_positions(
    token_ids: Sequence[int], token_word_ids: Sequence[int], noun_ids: Sequence[int]
) -> list[int]:
    """Positions of a concept's own words in a prompt: V* wherever it stands, and the class noun
    where it follows V* at once; of a concept without a token its noun wherever that stands.
    """
    ids, token, noun = list(token_ids), list(token_word_ids), list(noun_ids)
    first = token or noun
    own: list[int] = []
    for start in range(len(ids) - len(first) + 1) if first else ():
        if ids[start : start + len(first)] == first:
            end = start + len(first)
            if token and noun and ids[end : end + len(noun)] == noun:
                end += len(noun)
            own += range(start, end)
    return own


def constrained_positions(token_ids: Sequence[int], subject_ids: Sequence[int]) -> range:
    """Positions that a merge constrains: the subject (V* and class noun) to the end-of-text token.

    The text encoder is causal, so the words before the subject are the same for every concept and
    must not be constrained. `token_ids` is an unpadded prompt with its start and end tokens.
    """
    for start in range(len(token_ids) - len(subject_ids), 0, -1) if subject_ids else ():
        if list(token_ids[start : start + len(subject_ids)]) == list(subject_ids):
            return range(start, len(token_ids))
    raise ValueError("the prompt does not contain its subject")
