"""The concept file: exact round trips, names that stock loaders read, and what every wrong file,
full disk or killed process comes to.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.atomic import write_atomically, write_text_atomically
from custom_diffusion.concept.concept import Concept, ModifierToken
from custom_diffusion.concept.delta import DenseDelta, LowRankDelta
from custom_diffusion.concept.errors import ConceptFileError, TokenError
from custom_diffusion.concept.file import read_concept, size_of, write_concept, write_new_concept
from custom_diffusion.concept.layers import FAMILIES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.concepts import KEY, LAYERS, VALUE, random_concept
from torch import Tensor

SD15, SDXL = FAMILIES["sd15"], FAMILIES["sdxl"]
needs_posix = pytest.mark.skipif(os.name == "nt", reason="uses POSIX limits and users")


def assert_same(read: Concept, written: Concept, dtype: torch.dtype) -> None:
    """Bit for bit what was written, once rounded to the data type of the file."""
    expected = written.to(dtype)
    assert read.family is written.family
    assert read.base_hash == written.base_hash
    assert read.constraint_prompts == written.constraint_prompts
    assert read.provenance == written.provenance
    assert set(read.deltas) == set(written.deltas)
    for layer, delta in expected.deltas.items():
        assert type(read.deltas[layer]) is type(delta)
        for name, tensor in delta.tensors().items():
            assert_equal(read.deltas[layer].tensors()[name], tensor)
    assert [(t.name, t.class_noun, t.initializer) for t in read.tokens] == [
        (t.name, t.class_noun, t.initializer) for t in expected.tokens
    ]
    for token, other in zip(read.tokens, expected.tokens, strict=True):
        assert set(token.embeddings) == set(other.embeddings)
        for encoder, embedding in other.embeddings.items():
            assert_equal(token.embeddings[encoder], embedding)


def assert_equal(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert torch.equal(a, b)


def message_of(path: Path) -> str:
    """What a user reads when the file cannot be used; always with the file's name."""
    with pytest.raises(ConceptFileError) as caught:
        read_concept(path)
    message = str(caught.value)
    assert path.name in message
    return message


def changed(
    path: Path,
    change: Callable[[dict[str, Tensor], dict[str, str]], object],
    concept: Concept | None = None,
) -> Path:
    """Writes a good concept, changes its tensors and metadata in place, writes those instead."""
    write_concept(concept or random_concept(family=SD15, rank=4), path)
    tensors, metadata = load_file(path), metadata_of(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


class TestRoundTrip:
    @pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl", "miniature"])
    @pytest.mark.parametrize("rank", [None, 4], ids=["dense", "low rank"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
    def test_what_is_read_is_what_was_written(
        self, tmp_path: Path, family: str, rank: int | None, dtype: torch.dtype
    ) -> None:
        concept = replace(
            random_concept(family=FAMILIES[family], rank=rank),
            base_hash="0123456789abcdef",
            constraint_prompts=("<new1> cat", "photo of a <new1> cat"),
            provenance={"method": "custom diffusion", "steps": 250, "final_losses": [0.5, 0.25]},
        )
        path = write_concept(concept, tmp_path / "cat.safetensors", dtype)
        assert_same(read_concept(path), concept, dtype)

    def test_half_precision_is_the_default(self, tmp_path: Path) -> None:
        path = write_concept(random_concept(family=SD15), tmp_path / "cat.safetensors")
        assert {t.dtype for t in load_file(path).values()} == {torch.float16}

    def test_a_second_round_trip_changes_nothing(self, tmp_path: Path) -> None:
        concept = random_concept(family=SDXL, rank=2)
        once = read_concept(write_concept(concept, tmp_path / "1.safetensors"))
        twice = read_concept(write_concept(once, tmp_path / "2.safetensors"))
        assert_same(twice, once, torch.float16)

    @pytest.mark.parametrize("family", [SD15, SDXL], ids=["sd15", "sdxl"])
    def test_a_concept_without_tokens(self, tmp_path: Path, family: Any) -> None:
        concept = random_concept(token=None, family=family)
        path = write_concept(concept, tmp_path / "style.safetensors")
        assert_same(read_concept(path), concept, torch.float16)
        assert not [name for name in load_file(path) if name.startswith("bundle_emb.")]

    def test_a_concept_without_deltas(self, tmp_path: Path) -> None:
        concept = replace(random_concept(family=SDXL), deltas={})
        path = write_concept(concept, tmp_path / "word.safetensors")
        assert_same(read_concept(path), concept, torch.float16)

    def test_words_outside_ascii_survive(self, tmp_path: Path) -> None:
        concept = random_concept("<Mütze>", "帽子 für den Winter", family=SD15)
        concept = replace(concept, constraint_prompts=("<Mütze> 帽子",), provenance={"wer": "Zoë"})
        path = write_concept(concept, tmp_path / "Mütze 帽子.safetensors")
        assert_same(read_concept(path), concept, torch.float16)

    def test_several_tokens_and_several_vectors(self, tmp_path: Path) -> None:
        first = random_concept(family=SDXL)
        second = ModifierToken(
            "<new2>",
            "dog",
            {name: torch.randn(3, width) for name, width in SDXL.text_encoders.items()},
        )
        concept = replace(first, tokens=(*first.tokens, second))
        path = write_concept(concept, tmp_path / "two.safetensors", torch.float32)
        assert_same(read_concept(path), concept, torch.float32)

    def test_an_embedding_may_be_one_row_without_a_second_dimension(self, tmp_path: Path) -> None:
        """As some tools write the embedding of a single vector."""
        path = changed(
            tmp_path / "flat.safetensors",
            lambda tensors, _: tensors.update(
                {k: t[0].clone() for k, t in tensors.items() if k.startswith("bundle_emb.")}
            ),
        )
        assert read_concept(path).tokens[0].embeddings["clip_l"].shape == (1, 768)

    def test_layers_that_share_their_down_factor_can_be_written(self, tmp_path: Path) -> None:
        """A merged concept is like this; safetensors refuses tensors that share memory."""
        down = torch.randn(6, 768)
        deltas = {layer: LowRankDelta(torch.randn(out, 6), down) for layer, out in LAYERS.items()}
        concept = replace(random_concept(family=SD15), deltas=deltas)
        path = write_concept(concept, tmp_path / "merged.safetensors", torch.float32)
        assert_same(read_concept(path), concept, torch.float32)

    def test_tensors_that_are_views_or_need_a_gradient_can_be_written(self, tmp_path: Path) -> None:
        weight = torch.nn.Parameter(torch.randn(768, 24))
        concept = replace(random_concept(family=SD15), deltas={KEY: DenseDelta(weight.T)})
        read = read_concept(write_concept(concept, tmp_path / "v.safetensors", torch.float32))
        assert torch.equal(read.deltas[KEY].dense(), weight.detach().T)

    def test_an_alpha_other_than_the_rank_scales_the_factors(self, tmp_path: Path) -> None:
        def halve(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
            tensors.update({k: t / 2 for k, t in tensors.items() if k.endswith(".alpha")})

        concept = random_concept(family=SD15, rank=4)
        read = read_concept(changed(tmp_path / "half.safetensors", halve, concept))
        for layer, delta in concept.to(torch.float16).deltas.items():
            torch.testing.assert_close(
                read.deltas[layer].dense(), delta.dense() / 2, rtol=2e-3, atol=1e-4
            )

    def test_writing_changes_neither_the_concept_nor_its_data_types(self, tmp_path: Path) -> None:
        concept = random_concept(family=SD15, rank=4)
        copy = concept.to(torch.float64).to(torch.float32)
        write_concept(concept, tmp_path / "cat.safetensors")
        assert_same(concept, copy, torch.float32)


class TestNamesAndMetadata:
    def test_dense_projections_have_the_names_of_stock_loaders(self, tmp_path: Path) -> None:
        path = write_concept(random_concept(family=SD15), tmp_path / "cat.safetensors")
        assert set(load_file(path)) == {
            "bundle_emb.<new1>.string_to_param.*",
            *(f"diffusion_model.{layer}.diff" for layer in LAYERS),
        }

    def test_low_rank_projections_and_two_encoders(self, tmp_path: Path) -> None:
        path = write_concept(random_concept(family=SDXL, rank=4), tmp_path / "cat.safetensors")
        tensors = load_file(path)
        assert set(tensors) == {
            "bundle_emb.<new1>.clip_l",
            "bundle_emb.<new1>.clip_g",
            *(
                f"diffusion_model.{layer}.{name}"
                for layer in LAYERS
                for name in ("lora_up.weight", "lora_down.weight", "alpha")
            ),
        }
        assert tensors["bundle_emb.<new1>.clip_l"].shape == (1, 768)
        assert tensors["bundle_emb.<new1>.clip_g"].shape == (1, 1280)

    @pytest.mark.parametrize("rank", [1, 4, 7])
    def test_the_lora_formula_gives_the_delta(self, tmp_path: Path, rank: int) -> None:
        """up · down · alpha / rank, as every LoRA loader computes it."""
        concept = random_concept(family=SD15, rank=rank)
        path = write_concept(concept, tmp_path / "cat.safetensors", torch.float32)
        tensors = load_file(path)
        for layer, delta in concept.deltas.items():
            prefix = f"diffusion_model.{layer}"
            up = tensors[f"{prefix}.lora_up.weight"].numpy()
            down = tensors[f"{prefix}.lora_down.weight"].numpy()
            alpha = float(tensors[f"{prefix}.alpha"])
            assert alpha == rank == down.shape[0]
            patch = torch.from_numpy((up @ down) * (alpha / down.shape[0]))
            torch.testing.assert_close(patch, delta.dense(), rtol=1e-6, atol=1e-7)

    def test_metadata_says_what_the_file_is(self, tmp_path: Path) -> None:
        concept = replace(
            random_concept("<new1>", "Kätzchen", family=SDXL),
            base_hash="abc",
            constraint_prompts=("<new1> Kätzchen",),
            provenance={"steps": 3},
        )
        path = write_concept(concept, tmp_path / "My cat.safetensors")
        metadata = metadata_of(path)
        created = metadata.pop("created")
        assert metadata.pop("modelspec.date") == created
        assert datetime.fromisoformat(created).utcoffset() is not None
        assert json.loads(metadata.pop("tokens")) == [
            {"name": "<new1>", "class_noun": "Kätzchen", "initializer": "ktn"}
        ]
        assert json.loads(metadata.pop("constraint_prompts")) == ["<new1> Kätzchen"]
        assert json.loads(metadata.pop("provenance")) == {"steps": 3}
        assert metadata == {
            "format": "custom-diffusion-concept",
            "format_version": "1.0",
            "base_family": "sdxl",
            "base_hash": "abc",
            "scope": "every word",
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": "stable-diffusion-xl-v1/lora",
            "modelspec.implementation": "custom-diffusion",
            "modelspec.title": "My cat",
            "modelspec.trigger_phrase": "<new1> Kätzchen",
        }

    @pytest.mark.parametrize(
        ("family", "architecture"),
        [("sd15", "stable-diffusion-v1/lora"), ("sdxl", "stable-diffusion-xl-v1/lora")],
    )
    def test_the_architecture_is_the_one_of_the_modelspec_standard(
        self, tmp_path: Path, family: str, architecture: str
    ) -> None:
        concept = random_concept(family=FAMILIES[family])
        metadata = metadata_of(write_concept(concept, tmp_path / "cat.safetensors"))
        assert metadata["modelspec.architecture"] == architecture


def _set(**metadata: str) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    return lambda _, old: old.update(metadata)


class TestVersions:
    @pytest.mark.parametrize("version", ["1.0", "1.1", "1.99"])
    def test_newer_minor_versions_are_read(self, tmp_path: Path, version: str) -> None:
        path = changed(tmp_path / "new.safetensors", _set(format_version=version, unheard_of="x"))
        assert read_concept(path).tokens[0].name == "<new1>"

    @pytest.mark.parametrize("version", ["2.0", "0.9", "10.0", "one"])
    def test_other_major_versions_are_refused(self, tmp_path: Path, version: str) -> None:
        message = message_of(changed(tmp_path / "new.safetensors", _set(format_version=version)))
        assert f"format {version}" in message
        assert "reads 1.x" in message
        assert "Update the pack" in message

    def test_a_file_without_a_version_is_refused(self, tmp_path: Path) -> None:
        message = message_of(changed(tmp_path / "new.safetensors", _set(format_version="")))
        assert "without a format version" in message
        assert "another copy" in message

    def test_an_unknown_family_is_refused_with_the_known_ones(self, tmp_path: Path) -> None:
        message = message_of(changed(tmp_path / "f.safetensors", _set(base_family="sd9")))
        assert "'sd9'" in message
        assert all(name in message for name in FAMILIES)
        assert "Update the pack" in message


class TestWrongFiles:
    def test_a_missing_file(self, tmp_path: Path) -> None:
        message = message_of(tmp_path / "nothing.safetensors")
        assert str(tmp_path) in message
        assert "Check the name" in message

    def test_a_folder(self, tmp_path: Path) -> None:
        folder = tmp_path / "folder.safetensors"
        folder.mkdir()
        message_of(folder)

    @pytest.mark.parametrize("rank", [None, 4], ids=["dense", "low rank"])
    def test_truncated_anywhere(self, tmp_path: Path, rank: int | None) -> None:
        whole = write_concept(random_concept(family=SD15, rank=rank), tmp_path / "a.safetensors")
        content = whole.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        path = tmp_path / "cut.safetensors"
        lengths = {*range(0, 20), header - 1, header, header + 1, len(content) - 1}
        lengths |= set(range(20, header, 97)) | set(range(header, len(content), 9973))
        for length in sorted(lengths):
            path.write_bytes(content[:length])
            message = message_of(path)
            assert "truncated" in message or "end is missing" in message, length
            assert "save the concept again" in message, length
            assert "pickle" not in message, length

    @pytest.mark.parametrize("header_length", [640, 896, 1152, 1408, 19280])
    def test_a_cut_file_is_not_taken_for_a_pickle(self, tmp_path: Path, header_length: int) -> None:
        """These header lengths begin with the very bytes that a pickle or an archive begins with.

        safetensors pads headers to a multiple of 8, so files with such headers exist.
        """
        header = b'{"__metadata__":{"format":"custom-diffusion-concept"}'.ljust(header_length)
        path = tmp_path / "cut.safetensors"
        path.write_bytes(header_length.to_bytes(8, "little") + header[: header_length // 2])
        message = message_of(path)
        assert "pickle" not in message
        assert "truncated" in message

    @pytest.mark.parametrize("content", [b"", b"cat", b"<!DOCTYPE html>" + b"x" * 500, bytes(999)])
    def test_not_safetensors_at_all(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "page.safetensors"
        path.write_bytes(content)
        assert "again" in message_of(path)

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_a_pickle_is_never_opened(self, tmp_path: Path, protocol: int) -> None:
        path = tmp_path / "delta.safetensors"
        path.write_bytes(pickle.dumps(_Trap(tmp_path / "opened"), protocol))
        message = message_of(path)
        assert "pickle" in message
        assert ".safetensors" in message
        assert not (tmp_path / "opened").exists()

    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_a_torch_checkpoint_with_another_name(self, tmp_path: Path, zipped: bool) -> None:
        path = tmp_path / "delta.safetensors"
        state = {"modifier_token": {"<new1>": torch.randn(768)}, "trap": _Trap(tmp_path / "opened")}
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        message = message_of(path)
        assert "pickle" in message
        assert "Ask for the concept as .safetensors" in message
        assert not (tmp_path / "opened").exists()

    @pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"ss_network_dim": "8"}])
    def test_an_ordinary_lora(self, tmp_path: Path, metadata: dict[str, str] | None) -> None:
        path = tmp_path / "lora.safetensors"
        save_file({"lora_unet_x.lora_up.weight": torch.zeros(8, 4)}, path, metadata)
        message = message_of(path)
        assert "not a concept" in message
        assert "custom-diffusion import" in message

    @needs_posix
    @pytest.mark.slow
    def test_a_file_that_may_not_be_read(self, tmp_path: Path) -> None:
        write_concept(random_concept(family=SD15, rank=1), tmp_path / "secret.safetensors")
        code = """
            import os
            from custom_diffusion.concept.errors import ConceptFileError
            from custom_diffusion.concept.file import read_concept
            os.chmod("secret.safetensors", 0)
            if os.getuid() == 0:
                os.chmod(".", 0o755)
                os.setuid(65534)
            try:
                read_concept("secret.safetensors")
            except ConceptFileError as error:
                print(error)
            """
        result = _run(code, tmp_path)
        assert "secret.safetensors" in result.stdout, result.stderr
        assert "ermission" in result.stdout


class _Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def _tensor(
    suffix: str, change: Callable[[Tensor], Tensor]
) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    """Changes the first tensor whose name ends with the suffix."""

    def apply(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        name = next(name for name in sorted(tensors) if name.endswith(suffix))
        tensors[name] = change(tensors[name]).contiguous()

    return apply


def _drop(suffix: str) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    return lambda tensors, _: tensors.pop(
        next(name for name in sorted(tensors) if name.endswith(suffix))
    )


def _with_value(value: float) -> Callable[[Tensor], Tensor]:
    def apply(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return apply


UP, DOWN, EMBEDDING = "lora_up.weight", "lora_down.weight", "string_to_param.*"
DAMAGE: dict[str, Callable[[dict[str, Tensor], dict[str, str]], object]] = {
    "down of another width": _tensor(DOWN, lambda t: t[:, :-1]),
    "up and down of different ranks": _tensor(UP, lambda t: t[:, :-1]),
    "up is a vector": _tensor(UP, lambda t: t[:, 0]),
    "down is a vector": _tensor(DOWN, lambda t: t[0]),
    "up has three dimensions": _tensor(UP, lambda t: t[..., None]),
    "rank zero": lambda tensors, _: [
        _tensor(UP, lambda t: t[:, :0])(tensors, {}),
        _tensor(DOWN, lambda t: t[:0])(tensors, {}),
    ],
    "whole numbers": _tensor(UP, lambda t: t.to(torch.int32)),
    "alpha is a vector": _tensor("alpha", lambda t: torch.ones(2)),
    "alpha is not a number": _tensor("alpha", lambda t: torch.tensor(float("nan"))),
    "alpha is missing": _drop("alpha"),
    "up is missing": _drop(UP),
    "down is missing": _drop(DOWN),
    "a projection of self-attention": lambda tensors, _: tensors.update(
        {f"diffusion_model.{KEY.replace('attn2', 'attn1')}.diff": torch.zeros(24, 768)}
    ),
    "NaN in up": _tensor(UP, _with_value(float("nan"))),
    "infinity in down": _tensor(DOWN, _with_value(float("inf"))),
    "NaN in an embedding": _tensor(EMBEDDING, _with_value(float("nan"))),
    "an embedding of another width": _tensor(EMBEDDING, lambda t: t[:, :-1]),
    "an embedding with three dimensions": _tensor(EMBEDDING, lambda t: t[None]),
    "an embedding of whole numbers": _tensor(EMBEDDING, lambda t: t.to(torch.int32)),
    "an embedding without vectors": _tensor(EMBEDDING, lambda t: t[:0]),
    "a token without its embedding": _drop(EMBEDDING),
    "nothing in it": lambda tensors, metadata: [tensors.clear(), metadata.update(tokens="[]")],
    "tokens are not JSON": _set(tokens='[{"name": "<new1>"'),
    "tokens are a number": _set(tokens="5"),
    "tokens are a string": _set(tokens='"<new1>"'),
    "tokens are null": _set(tokens="null"),
    "tokens are strings": _set(tokens='["<new1>"]'),
    "a token without a class noun": _set(tokens='[{"name": "<new1>"}]'),
    "a token without brackets": lambda tensors, metadata: [
        metadata.update(tokens='[{"name": "new1", "class_noun": "cat"}]'),
        tensors.update(
            {k.replace("<new1>", "new1"): t.clone() for k, t in tensors.items() if "<new1>" in k}
        ),
    ],
    "a token twice": _set(tokens=json.dumps([{"name": "<new1>", "class_noun": "cat"}] * 2)),
    "constraint prompts are not JSON": _set(constraint_prompts="<new1> cat"),
    "constraint prompts are a number": _set(constraint_prompts="5"),
    "constraint prompts are a string": _set(constraint_prompts='"<new1> cat"'),
    "constraint prompts are numbers": _set(constraint_prompts="[1, 2]"),
    "provenance is not JSON": _set(provenance="{"),
    "provenance is a list": _set(provenance="[]"),
}


class TestDamagedContent:
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_damage_is_found_when_the_file_is_read(self, tmp_path: Path, damage: str) -> None:
        message = message_of(changed(tmp_path / "bad.safetensors", DAMAGE[damage]))
        assert re.search("Save|another copy|Rename|Write", message), "says what to do"

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            ("down of another width", ("767", "768", "attn2.to_")),
            ("up and down of different ranks", ("(24, 3)", "(4, 768)", "do not chain")),
            ("NaN in up", ("not finite", "attn2.to_")),
            ("alpha is missing", ("lora_up.weight", "alpha")),
            ("a token without its embedding", ("bundle_emb.<new1>.string_to_param.*",)),
            ("a projection of self-attention", ("attn1",)),
            ("a token without brackets", ("'<new1>'",)),
        ],
    )
    def test_the_message_says_where(
        self, tmp_path: Path, damage: str, words: tuple[str, ...]
    ) -> None:
        message = message_of(changed(tmp_path / "bad.safetensors", DAMAGE[damage]))
        assert all(word in message for word in words), message

    def test_a_dense_projection_of_another_width(self, tmp_path: Path) -> None:
        path = changed(
            tmp_path / "bad.safetensors",
            _tensor(".diff", lambda t: t[:, :-1]),
            random_concept(family=SD15),
        )
        message = message_of(path)
        assert "767" in message
        assert "Stable Diffusion 1.x has 768" in message

    def test_the_second_encoder_of_sdxl_is_missed(self, tmp_path: Path) -> None:
        path = changed(
            tmp_path / "bad.safetensors", _drop("clip_g"), random_concept(family=SDXL, rank=1)
        )
        assert "bundle_emb.<new1>.clip_g" in message_of(path)


OLD = b"the old content"


class TestWriting:
    def test_a_folder_that_is_not_there_is_made(self, tmp_path: Path) -> None:
        path = write_concept(random_concept(family=SD15), tmp_path / "a" / "b" / "cat.safetensors")
        assert read_concept(path).tokens[0].name == "<new1>"

    def test_an_existing_file_is_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "cat.safetensors"
        path.write_bytes(OLD)
        write_concept(random_concept(family=SD15), path)
        assert read_concept(path).tokens[0].name == "<new1>"
        assert os.listdir(tmp_path) == ["cat.safetensors"]

    def test_text_is_written_as_utf8(self, tmp_path: Path) -> None:
        write_text_atomically(tmp_path / "a.json", "Mütze 帽子\n")
        assert (tmp_path / "a.json").read_bytes() == "Mütze 帽子\n".encode()

    @needs_posix
    @pytest.mark.slow
    def test_a_full_disk_leaves_the_old_file_and_nothing_else(self, tmp_path: Path) -> None:
        """Real failing writes: the process may not write a file larger than 64 KiB."""
        (tmp_path / "cat.safetensors").write_bytes(OLD)
        code = """
            import resource, signal
            from custom_diffusion.concept.errors import ConceptFileError
            from custom_diffusion.concept.file import write_concept
            from custom_diffusion.concept.layers import FAMILIES
            from support.concepts import random_concept
            concept = random_concept(family=FAMILIES["sd15"])
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
            try:
                write_concept(concept, "cat.safetensors")
            except ConceptFileError as error:
                print(error)
            """
        result = _run(code, tmp_path)
        numbers = r"about (\d+\.\d) MB were needed, (\d+\.\d) MB are free"
        found = re.search(numbers, result.stdout)
        assert found, result.stdout + result.stderr
        parameters = sum(LAYERS.values()) * 768 + 768
        assert float(found[1]) == pytest.approx(parameters * 2 / 1e6, abs=0.06)
        assert float(found[2]) > 0
        assert "cat.safetensors" in result.stdout
        assert "File too large" in result.stdout
        assert "Free some space" in result.stdout
        assert (tmp_path / "cat.safetensors").read_bytes() == OLD
        assert os.listdir(tmp_path) == ["cat.safetensors"]

    @needs_posix
    @pytest.mark.slow
    def test_text_that_does_not_fit_leaves_the_old_file_too(self, tmp_path: Path) -> None:
        (tmp_path / "state.json").write_bytes(OLD)
        code = """
            import resource, signal
            from pathlib import Path
            from custom_diffusion.concept.atomic import write_text_atomically
            from custom_diffusion.concept.errors import ConceptFileError
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
            try:
                write_text_atomically(Path("state.json"), "x" * 2_000_000)
            except ConceptFileError as error:
                print(error)
            """
        result = _run(code, tmp_path)
        assert "about 2.0 MB were needed" in result.stdout, result.stderr
        assert (tmp_path / "state.json").read_bytes() == OLD
        assert os.listdir(tmp_path) == ["state.json"]

    @pytest.mark.parametrize("below", ["", "deeper/still"])
    def test_a_folder_that_cannot_be_written(self, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").write_bytes(OLD)
        path = tmp_path / "file" / below / "cat.safetensors"
        with pytest.raises(ConceptFileError) as caught:
            write_concept(random_concept(family=SD15), path)
        message = str(caught.value)
        assert str(path) in message
        assert re.search(r"\d MB were needed, \d+\.\d MB are free", message)
        assert f"{tmp_path / 'file'} is no folder" in message
        assert "choose another folder" in message and "Free some space" not in message
        assert (tmp_path / "file").read_bytes() == OLD

    @needs_posix
    @pytest.mark.slow
    def test_a_folder_without_permission_to_write(self, tmp_path: Path) -> None:
        code = """
            import os
            from custom_diffusion.concept.errors import ConceptFileError
            from custom_diffusion.concept.file import write_concept
            from custom_diffusion.concept.layers import FAMILIES
            from support.concepts import random_concept
            write_concept(random_concept(family=FAMILIES["sd15"]), "first.safetensors")
            os.remove("first.safetensors")  # all that writing imports is imported now
            os.chmod(".", 0o555)
            if os.getuid() == 0:
                os.setuid(65534)
            try:
                write_concept(random_concept(family=FAMILIES["sd15"]), "cat.safetensors")
            except ConceptFileError as error:
                print(error)
            """
        result = _run(code, tmp_path)
        assert "cat.safetensors could not be written" in result.stdout, result.stderr
        assert "ermission denied" in result.stdout
        assert "Give yourself permission" in result.stdout
        assert "Free some space" not in result.stdout
        assert os.listdir(tmp_path) == []

    @pytest.mark.timeout(20)
    def test_a_new_file_in_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        """Looking for a free name must come to an end."""
        (tmp_path / "file").write_bytes(OLD)
        with pytest.raises(ConceptFileError, match="choose another folder"):
            write_new_concept(random_concept(family=SD15), tmp_path / "file", "cat")

    def test_a_name_that_is_too_long(self, tmp_path: Path) -> None:
        path = tmp_path / f"{'c' * 300}.safetensors"
        with pytest.raises(ConceptFileError, match="could not be written.*choose a shorter one"):
            write_concept(random_concept(family=SD15), path)
        assert os.listdir(tmp_path) == []

    def test_a_folder_whose_name_is_too_long(self, tmp_path: Path) -> None:
        path = tmp_path / ("c" * 300) / "cat.safetensors"
        with pytest.raises(ConceptFileError, match="could not be written"):
            write_concept(random_concept(family=SD15), path)
        assert os.listdir(tmp_path) == []

    @needs_posix
    def test_others_may_read_it_as_any_file_of_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "other").touch()
        write_concept(random_concept(), tmp_path / "concept.safetensors")
        modes = {path.stat().st_mode for path in tmp_path.iterdir()}
        assert len(modes) == 1

    def test_a_failure_of_another_kind_leaves_no_temporary_file(self, tmp_path: Path) -> None:
        path = tmp_path / "cat.safetensors"
        path.write_bytes(OLD)

        def write(temporary: Path) -> None:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, write)
        assert path.read_bytes() == OLD
        assert os.listdir(tmp_path) == ["cat.safetensors"]

    def test_a_process_killed_while_writing_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "cat.safetensors"
        path.write_bytes(OLD)
        code = """
            import os
            from pathlib import Path
            from custom_diffusion.concept.atomic import write_atomically

            def write(temporary):
                with open(temporary, "wb") as file:
                    file.write(b"half of the new content")
                    file.flush()
                    os._exit(9)

            write_atomically(Path("cat.safetensors"), write)
            """
        assert _run(code, tmp_path, status=9).returncode == 9
        assert path.read_bytes() == OLD
        left = [name for name in os.listdir(tmp_path) if name != path.name]
        assert all(name.startswith(".") and name.endswith(".tmp") for name in left)

    def test_the_new_file_is_on_disk_before_it_takes_its_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        events: list[str] = []
        fsync, rename = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda fd: (events.append("flush"), fsync(fd)))
        monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), rename(a, b)))
        write_text_atomically(tmp_path / "a.txt", "text")
        assert events[:2] == ["flush", "rename"]


class TestNewFiles:
    def test_an_existing_file_is_never_replaced(self, tmp_path: Path) -> None:
        concepts = [random_concept(family=SD15, seed=seed) for seed in range(3)]
        paths = [write_new_concept(concept, tmp_path, "cat") for concept in concepts]
        assert [p.name for p in paths] == [f"cat{n}.safetensors" for n in ("", "-2", "-3")]
        for path, concept in zip(paths, concepts, strict=True):
            assert_same(read_concept(path), concept, torch.float16)
        assert len(os.listdir(tmp_path)) == 3

    @pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
    def test_a_file_that_somebody_else_wrote_meanwhile_is_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
    ) -> None:
        """Also on a file system without hard links."""
        path = tmp_path / "cat.safetensors"

        def write(temporary: Path) -> None:
            temporary.write_bytes(b"ours")
            path.write_bytes(OLD)

        if not links:
            monkeypatch.setattr(os, "link", _no_links)
        with pytest.raises(FileExistsError):
            write_atomically(path, write, replace=False)
        assert path.read_bytes() == OLD
        assert os.listdir(tmp_path) == ["cat.safetensors"]

    def test_a_file_system_without_links_takes_new_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "link", _no_links)
        path = write_new_concept(random_concept(family=SD15), tmp_path, "cat")
        assert os.listdir(tmp_path) == [path.name] == ["cat.safetensors"]

    @pytest.mark.parametrize(
        ("name", "stem"),
        [
            ("my cat", "my-cat"),
            ("Mütze 帽子", "Mütze-帽子"),
            ("../../etc/passwd", "etc-passwd"),
            ("C:\\cat", "C--cat"),
            ("<new1>", "new1"),
            ("v1.5_cat", "v1.5_cat"),
            ("..", "concept"),
            ("", "concept"),
            (" \n", "concept"),
            ("a\0b", "a-b"),
        ],
    )
    def test_a_name_cannot_leave_its_folder(self, tmp_path: Path, name: str, stem: str) -> None:
        path = write_new_concept(random_concept(family=SD15, rank=1), tmp_path, name)
        assert path == tmp_path / f"{stem}.safetensors"

    @pytest.mark.parametrize("name", ["c" * 500, "帽" * 500])
    def test_a_long_name_is_shortened(self, tmp_path: Path, name: str) -> None:
        path = write_new_concept(random_concept(family=SD15, rank=1), tmp_path, name)
        assert name.startswith(path.stem)
        assert len(path.name.encode()) < 200


def _no_links(*_: object) -> None:
    raise PermissionError("this file system has no hard links")


class TestRenaming:
    def test_a_concept_under_another_token_keeps_its_meaning(self, tmp_path: Path) -> None:
        concept = random_concept(
            family=SD15, constraint_prompts=("<new1> cat", "photo of a <new1> cat")
        )
        renamed = concept.with_token("<tom>")
        assert renamed.constraint_prompts == ("<tom> cat", "photo of a <tom> cat")
        path = write_concept(renamed, tmp_path / "tom.safetensors", torch.float32)
        embeddings = read_concept(path).embeddings()
        assert_equal(embeddings["clip_l"]["<tom>"], concept.tokens[0].embeddings["clip_l"])

    def test_a_new_name_must_be_well_formed(self) -> None:
        with pytest.raises(TokenError, match="'<tom>'"):
            random_concept().with_token("tom")

    @pytest.mark.parametrize("token", [None, "<new1>"])
    def test_only_a_concept_with_one_token_can_be_renamed(self, token: str | None) -> None:
        concept = random_concept(token=token)
        if token:
            other = random_concept(token="<new2>").tokens
            concept = replace(concept, tokens=(*concept.tokens, *other))
        with pytest.raises(TokenError, match="one trigger word"):
            concept.with_token("<tom>")


@pytest.mark.parametrize(
    ("size", "said"),
    [(0, "0 kB"), (5400, "5 kB"), (99_400, "99 kB"), (100_000, "0.1 MB"), (38_340_000, "38.3 MB")],
)
def test_a_size_is_said_in_a_unit_that_shows_it(tmp_path: Path, size: int, said: str) -> None:
    file = tmp_path / "file"
    with file.open("wb") as opened:
        opened.truncate(size)
    assert size_of(file) == said


def test_the_output_width_of_a_layer_is_free(tmp_path: Path) -> None:
    """It differs from layer to layer; only a model can tell."""
    concept = random_concept(family=SD15, layers=(KEY, VALUE))
    assert concept.deltas[VALUE].shape == (24, 768)
    concept = replace(concept, deltas={**concept.deltas, VALUE: DenseDelta(torch.zeros(9, 768))})
    path = write_concept(concept, tmp_path / "cat.safetensors")
    assert read_concept(path).deltas[VALUE].shape == (9, 768)


def _run(code: str, folder: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, in the folder, with the pack and the helpers at hand."""
    tests = Path(__file__).resolve().parents[1]
    lines = [
        f"import sys; sys.path.insert(0, {str(tests)!r}); import conftest",
        *(line[12:] for line in code.splitlines()),
    ]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == status, result.stderr
    return result
