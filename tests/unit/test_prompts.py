"""Modifier tokens and prompts: how they are checked, split and found in a tokenized prompt."""

from __future__ import annotations

import re

import pytest
from custom_diffusion.concept.errors import TokenError
from custom_diffusion.concept.prompts import (
    CONSTRAINT_TEMPLATES,
    check_modifier_token,
    constrained_positions,
    split_at_tokens,
    subject,
    unknown_words,
)
from custom_diffusion.concept.weighted_prompts import as_prompt, weighted_parts

MALFORMED = (
    "new1",
    "",
    "<>",
    "<new1",
    "new1>",
    "<my cat>",
    " <new1>",
    "<new1> ",
    "<new1>\n",
    "<new1><new2>",
    "<a<b>>",
    "<new.1>",
    "<|endoftext|>",
    "<!!!>",
    "[new1]",
)


@pytest.mark.parametrize("token", ["<new1>", "<my-cat>", "<my_cat>", "<1>", "<Mütze>", "<猫>"])
def test_a_name_in_angle_brackets_is_a_modifier_token(token: str) -> None:
    assert check_modifier_token(token) == token


@pytest.mark.parametrize("token", MALFORMED)
def test_anything_else_is_refused_with_a_name_that_works(token: str) -> None:
    with pytest.raises(TokenError) as caught:
        check_modifier_token(token)
    message = str(caught.value)
    assert repr(token) in message
    suggestions = re.findall(r"'(<[^']*>)', for example", message)
    assert len(suggestions) == 1
    check_modifier_token(suggestions[0])


def test_the_suggested_name_stays_close_to_the_one_given() -> None:
    with pytest.raises(TokenError, match="'<my-cat>'"):
        check_modifier_token("my cat")


@pytest.mark.parametrize(
    ("token", "noun", "words"),
    [("<new1>", "cat", "<new1> cat"), (None, "cat", "cat"), ("<new1>", "", "<new1>")],
)
def test_the_subject_is_the_token_and_its_class_noun(
    token: str | None, noun: str, words: str
) -> None:
    assert subject(token, noun) == words


@pytest.mark.parametrize(
    ("text", "tokens", "pieces"),
    [
        ("photo of a <new1> cat", ["<new1>"], ["photo of a ", "<new1>", " cat"]),
        ("<new1>", ["<new1>"], ["<new1>"]),
        ("<new1><new2>", ["<new1>", "<new2>"], ["<new1>", "<new2>"]),
        ("a<new1>b", ["<new1>"], ["a", "<new1>", "b"]),
        ("a <new2> cat", ["<new1>"], ["a <new2> cat"]),
        ("a cat", [], ["a cat"]),
        ("", ["<new1>"], []),
        ("", [], []),
        ("a <x.y> cat <xzy>", ["<x.y>"], ["a ", "<x.y>", " cat <xzy>"]),
        ("ab abc", ["ab", "abc"], ["ab", " ", "abc"]),
        ("<NEW1> cat", ["<new1>"], ["<NEW1> cat"]),
    ],
)
def test_every_modifier_token_stands_alone(text: str, tokens: list[str], pieces: list[str]) -> None:
    assert split_at_tokens(text, tokens) == pieces
    assert split_at_tokens(text, reversed(tokens)) == pieces
    assert "".join(pieces) == text


START, END, PHOTO, OF, A, NEW, CAT = 0, 1, 10, 11, 12, 100, 13


@pytest.mark.parametrize(
    ("ids", "words", "positions"),
    [
        ([START, NEW, CAT, END], [NEW], [1, 2, 3]),
        ([START, PHOTO, OF, A, NEW, CAT, END], [NEW], [4, 5, 6]),
        ([START, PHOTO, OF, A, NEW, CAT, END], [NEW, CAT], [4, 5, 6]),
        ([START, CAT, END], [CAT], [1, 2]),
        ([START, NEW, A, NEW, CAT, END], [NEW], [3, 4, 5]),
        ([START, NEW, NEW + 1, CAT, END], [NEW, NEW + 1], [1, 2, 3, 4]),
    ],
)
def test_a_merge_constrains_the_subject_and_what_follows_it(
    ids: list[int], words: list[int], positions: list[int]
) -> None:
    assert list(constrained_positions(ids, words)) == positions


@pytest.mark.parametrize("ids", [[START, CAT, END], [NEW, CAT, END], []])
def test_a_prompt_without_its_subject_is_refused(ids: list[int]) -> None:
    """The start token, at position 0, is never part of a subject."""
    with pytest.raises(ValueError, match="does not contain its subject"):
        constrained_positions(ids, [NEW])


def test_a_subject_without_words_is_in_no_prompt() -> None:
    """A class noun of spaces, for instance, has no word for the text encoder."""
    with pytest.raises(ValueError, match="does not contain its subject"):
        constrained_positions([START, CAT, END], [])


def test_the_constraint_templates_are_those_of_the_reference() -> None:
    assert [t.format("<new1> cat") for t in CONSTRAINT_TEMPLATES] == [
        "<new1> cat",
        "photo of a <new1> cat",
    ]


def test_words_that_nothing_teaches_are_found_once_each() -> None:
    text = "a <new1> cat, <NEW1>, (<dog-2>:1.2) and <dog-2>, <lora:x:1>, 3 < 4 > 2, <new12>"
    assert unknown_words(text, ["<new1>"]) == ["<NEW1>", "<dog-2>", "<new12>"]
    assert unknown_words("a <new1> cat", ["<new1>"]) == []
    assert unknown_words("a <new1> cat", []) == ["<new1>"]


WEIGHTED = [
    ("", []),
    ("a cat", [("a cat", 1.0)]),
    ("a (cat)", [("a ", 1.0), ("cat", 1.1)]),
    ("(a cat:1.3) sits", [("a cat", 1.3), (" sits", 1.0)]),
    ("((a):0.5)", [("a", 0.55)]),
    (r"\(a\) (b:c:2)", [("(a) ", 1.0), ("b:c", 2.0)]),
    ("(a:x)", [("a:x", 1.1)]),
    ("(a", [("(a", 1.0)]),
    ("a)", [("a)", 1.0)]),
    ("(a:inf)", [("a:inf", 1.1)]),
]


@pytest.mark.parametrize(("prompt", "parts"), WEIGHTED)
def test_brackets_weigh(prompt: str, parts: list[tuple[str, float]]) -> None:
    found = weighted_parts(prompt)
    assert [text for text, _ in found] == [text for text, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])
    assert weighted_parts(as_prompt(found)) == found
