"""Folders in diffusers' layout are read as data: a good one gives to the bit what diffusers itself
loads of it, and a hostile one runs nothing, fetches nothing, and ends in a message where it cannot
be read.
"""

from __future__ import annotations

import json
import pickle
import runpy
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.errors import IncompatibleModelError
from custom_diffusion.host.diffusers.folder import read_pipeline
from custom_diffusion.host.diffusers.loading import load_network, load_pipeline
from custom_diffusion.host.open_clip.vocabulary import END, START, write_vocabulary
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save_file
from support.tiny_models import same_state, state
from transformers import CLIPTokenizer

PROMPT = "Photo of a cat, don't  LOOK: naïve ☃"
WEIGHTS = "diffusion_pytorch_model"
NETWORKS = "unet", "vae", "text_encoder", "text_encoder_2"


@pytest.fixture(scope="module")
def sd_folder(pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def xl_folder(
    xl_pipeline: StableDiffusionXLPipeline, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("xl")
    xl_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(sd_folder: Path, tmp_path: Path) -> Path:
    """The folder of Stable Diffusion 1.x, to be changed."""
    return Path(shutil.copytree(sd_folder, tmp_path / "model"))


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every try to look up a name or to connect; all of them fail."""
    tries: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        tries.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tries


def parts(pipeline: Any) -> list[Any]:
    return [getattr(pipeline, name) for name in NETWORKS if hasattr(pipeline, name)]


def assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    assert same_state(state(*parts(theirs)), *parts(ours))
    for own, other in zip(parts(ours), parts(theirs), strict=True):
        assert {p.dtype for p in own.parameters()} == {p.dtype for p in other.parameters()}
        assert all(not tensor.is_meta for tensor in (*own.parameters(), *own.buffers()))
        assert not any(module.training for module in own.modules())
        assert [p.requires_grad for p in own.parameters()] == [
            p.requires_grad for p in other.parameters()
        ]
    for name in ("tokenizer", "tokenizer_2"):
        if hasattr(theirs, name):
            settings = {"padding": "max_length", "truncation": True}
            own, other = getattr(ours, name), getattr(theirs, name)
            assert own(PROMPT, **settings).input_ids == other(PROMPT, **settings).input_ids
            assert own.pad_token_id == other.pad_token_id
            assert len(own) == len(other)
    for name in ("unet", "vae", "scheduler"):
        own, other = (
            {k: v for k, v in getattr(p, name).config.items() if not k.startswith("_")}
            for p in (ours, theirs)
        )
        assert own == {name: other[name] for name in own}
    assert type(ours.scheduler) is type(theirs.scheduler)
    assert torch.equal(ours.scheduler.alphas_cumprod, theirs.scheduler.alphas_cumprod)


# Good folders


def test_stable_diffusion_is_what_diffusers_loads(sd_folder: Path, network: list[Any]) -> None:
    ours = read_pipeline(sd_folder)
    assert network == []
    assert_same(ours, StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None))


def test_stable_diffusion_xl_is_what_diffusers_loads(xl_folder: Path, network: list[Any]) -> None:
    ours = read_pipeline(xl_folder)
    assert network == []
    theirs = StableDiffusionXLPipeline.from_pretrained(xl_folder, add_watermarker=False)
    assert_same(ours, theirs)


def test_another_scheduler_is_kept(copied: Path, pipeline: StableDiffusionPipeline) -> None:
    shutil.rmtree(copied / "scheduler")
    euler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    euler.save_pretrained(copied / "scheduler")
    change(copied / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    theirs = StableDiffusionPipeline.from_pretrained(copied, safety_checker=None)
    assert_same(read_pipeline(copied), theirs)


def test_rounded_and_divided_weights_are_read_where_they_are_all_there_is(
    copied: Path, pipeline: StableDiffusionPipeline
) -> None:
    for file in copied.rglob("*.safetensors"):
        file.unlink()
    pipeline.save_pretrained(copied, variant="fp16")
    pipeline.unet.save_pretrained(copied / "unet", variant="fp16", max_shard_size="200KB")
    names = {file.name for file in (copied / "unet").iterdir()}
    (copied / "unet" / f"{WEIGHTS}.fp16.safetensors").unlink()
    assert f"{WEIGHTS}.safetensors.index.fp16.json" in names
    assert (copied / "text_encoder" / "model.fp16.safetensors").is_file()
    assert same_state(state(*parts(pipeline)), *parts(read_pipeline(copied)))


def test_half_precision_becomes_single(copied: Path, pipeline: StableDiffusionPipeline) -> None:
    for file in copied.rglob("*.safetensors"):
        halved = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(halved, file, metadata={"format": "pt"})
    loaded = read_pipeline(copied)
    assert {p.dtype for part in parts(loaded) for p in part.parameters()} == {torch.float32}
    weight = pipeline.unet.conv_in.weight.half().float()
    assert torch.equal(loaded.unet.conv_in.weight, weight)


def test_names_of_older_files_are_known(copied: Path, pipeline: StableDiffusionPipeline) -> None:
    """Those of Stable Diffusion 1.5 as it was published, which diffusers renames too."""
    vae, text = copied / "vae" / f"{WEIGHTS}.safetensors", copied / "text_encoder"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(vae)
    for new, name in old.items():
        weights = {
            k.replace(f".attentions.0.{new}.", f".attentions.0.{name}."): w
            for k, w in weights.items()
        }
    assert sum(".attentions.0.query." in name for name in weights) == 4
    save_file(weights, vae, metadata={"format": "pt"})
    words = load_file(text / "model.safetensors")
    words = {f"text_model.{k.removeprefix('text_model.')}": w for k, w in words.items()}
    words["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(words, text / "model.safetensors", metadata={"format": "pt"})
    assert same_state(state(*parts(pipeline)), *parts(read_pipeline(copied)))
    theirs = StableDiffusionPipeline.from_pretrained(copied, safety_checker=None)
    assert same_state(state(*parts(theirs)), *parts(pipeline))


def test_text_weights_are_read_without_their_prefix(
    copied: Path, pipeline: StableDiffusionPipeline
) -> None:
    """As transformers 5 writes them."""
    file = copied / "text_encoder" / "model.safetensors"
    words = {k.removeprefix("text_model."): w for k, w in load_file(file).items()}
    save_file(words, file, metadata={"format": "pt"})
    loaded = read_pipeline(copied)
    assert same_state(state(pipeline.text_encoder), loaded.text_encoder)


@pytest.mark.parametrize("files", [1, 2])
def test_a_tokenizer_is_the_same_in_one_file_and_in_two(
    copied: Path, tokenizer: CLIPTokenizer, files: int
) -> None:
    """transformers 4 writes and needs two, transformers 5 writes one; both say what was added."""
    folder = copied / "tokenizer"
    shutil.rmtree(folder)
    folder.mkdir()
    clip = SimpleTokenizer()
    pieces, merges = [*list(clip.encoder)[:-2], START, END], list(clip.bpe_ranks)
    added = {"<cat-toy>": len(pieces)}
    if files == 2:
        write_vocabulary(folder, pieces, merges)
        (folder / "added_tokens.json").write_text(json.dumps(added))
    else:
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        whole = {
            "model": {"type": "BPE", "vocab": vocabulary, "merges": [" ".join(m) for m in merges]},
            "added_tokens": [{"id": number, "content": token} for token, number in added.items()],
        }
        (folder / "tokenizer.json").write_text(json.dumps(whole))
    settings = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": "!"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 77}))
    loaded = read_pipeline(copied).tokenizer
    ids = tokenizer(PROMPT).input_ids
    assert loaded(PROMPT, padding="max_length").input_ids == [*ids, *[0] * (77 - len(ids))]
    assert loaded("<cat-toy>").input_ids == [ids[0], len(pieces), ids[-1]]


# Hostile folders


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that appears when code of the hostile folder runs."""
    return tmp_path / "code ran"


def evil_code(mark: Path) -> str:
    classes = "UNet2DConditionModel", "CLIPTextModel", "CLIPTokenizer", "AutoencoderKL"
    more = *classes, "DDPMScheduler", "Evil", "Pipeline", "Quantizer", "generate"
    names = "\n".join(f"class {name}: pass" for name in more)
    return f"from pathlib import Path\nPath({str(mark)!r}).touch()\n{names}\n"


class Touch:
    """What a pickle can do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def change(file: Path, **settings: Any) -> None:
    found = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**found, **settings}))


def make_hostile(folder: Path, mark: Path) -> None:
    """Code, pickles and references to both wherever a library has ever looked for them."""
    auto_map = {
        name: "evil.Evil" for name in ("AutoModel", "AutoConfig", "AutoTokenizer", "AutoPipeline")
    }
    auto_map["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]  # type: ignore[assignment]
    strange = {
        "auto_map": auto_map,
        "trust_remote_code": True,
        "custom_pipeline": "pipeline",
        "_module": "evil",
        "_name_or_path": "stranger/evil",
        "quantization_config": {"quant_method": "evil", "load_in_4bit": True},
    }
    for place in [folder, *(path for path in folder.iterdir() if path.is_dir())]:
        for name in ("evil", "pipeline", place.name, "__init__", "modeling_evil", "quantizer"):
            (place / f"{name}.py").write_text(evil_code(mark))
        for name in ("pytorch_model", WEIGHTS, "adapter_model", "training_args", "scheduler"):
            (place / f"{name}.bin").write_bytes(pickle.dumps(Touch(mark)))
        (place / "requirements.txt").write_text("stranger-evil\n")
        adapter = {"base_model_name_or_path": "stranger/evil", "peft_type": "LORA", **strange}
        (place / "adapter_config.json").write_text(json.dumps(adapter))
        generate = place / "custom_generate"
        generate.mkdir()
        (generate / "generate.py").write_text(evil_code(mark))
    (folder / "config.json").write_text(json.dumps(strange))
    change(
        folder / "model_index.json",
        **strange,
        unet=["evil", "UNet2DConditionModel"],
        text_encoder=["pipeline", "CLIPTextModel"],
        tokenizer=["evil", "Evil"],
        scheduler=["scheduler", "DDPMScheduler"],
        safety_checker=["evil", "Evil"],
        feature_extractor=["evil", "Evil"],
    )
    for part in ("unet", "vae"):
        change(folder / part / "config.json", **strange)
    change(
        folder / "text_encoder" / "config.json",
        **strange,
        attn_implementation="stranger/evil",
        _attn_implementation="stranger/evil",
        architectures=["Evil"],
        model_type="evil",
    )
    change(folder / "scheduler" / "scheduler_config.json", **strange)
    change(folder / "tokenizer" / "config.json", **strange, model_type="evil")
    change(
        folder / "tokenizer" / "tokenizer_config.json",
        **strange,
        tokenizer_class="EvilTokenizer",
        tokenizer_file="../evil.py",
        chat_template="{{ cycler.__init__.__globals__ }}",
    )


def test_the_traps_of_these_tests_work(copied: Path, mark: Path) -> None:
    make_hostile(copied, mark)
    for trap in (
        lambda: runpy.run_path(str(copied / "unet" / "evil.py")),
        lambda: pickle.loads((copied / "unet" / f"{WEIGHTS}.bin").read_bytes()),
    ):
        trap()
        assert mark.exists()
        mark.unlink()


def test_a_hostile_folder_is_read_and_nothing_of_it_runs(
    copied: Path, mark: Path, network: list[Any], pipeline: StableDiffusionPipeline
) -> None:
    make_hostile(copied, mark)
    before = set(sys.modules)
    loaded = load_pipeline(copied)
    assert not mark.exists()
    assert network == []
    assert not [name for name in set(sys.modules) - before if "evil" in name]
    assert same_state(state(*parts(pipeline)), *parts(loaded))
    assert type(loaded.unet) is type(pipeline.unet)
    assert type(loaded.scheduler) is type(pipeline.scheduler)


def only_pickles(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        file.unlink()


def an_index_of_pickles(folder: Path) -> None:
    only_pickles(folder)
    for part, stem in (("unet", WEIGHTS), ("vae", WEIGHTS), ("text_encoder", "model")):
        index = {"metadata": {}, "weight_map": {"conv_in.weight": f"{WEIGHTS}.bin"}}
        (folder / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def pickles_called_safetensors(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        shutil.copyfile(folder / "unet" / f"{WEIGHTS}.bin", file)


def an_index_that_leaves_the_folder(folder: Path) -> None:
    (folder / "unet" / f"{WEIGHTS}.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"conv_in.weight": "../../outside.safetensors"}}
    (folder / "unet" / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index))


def a_class_of_the_folder(folder: Path) -> None:
    change(folder / "model_index.json", _class_name=["evil", "Pipeline"])


def a_network_of_the_folder(folder: Path) -> None:
    change(folder / "unet" / "config.json", _class_name="Evil")


def a_scheduler_of_the_folder(folder: Path) -> None:
    change(folder / "scheduler" / "scheduler_config.json", _class_name="Evil")


def a_scheduler_that_is_no_name(folder: Path) -> None:
    change(folder / "scheduler" / "scheduler_config.json", _class_name=["evil", "Evil"])


def a_pipeline_of_diffusers(folder: Path) -> None:
    change(folder / "scheduler" / "scheduler_config.json", _class_name="DiffusionPipeline")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            only_pickles,
            r"unet has no diffusion_pytorch_model.safetensors, only .*\.bin, which can run",
        ),
        (an_index_of_pickles, "diffusion_pytorch_model.bin is no readable .safetensors"),
        (pickles_called_safetensors, "diffusion_pytorch_model.safetensors is no readable"),
        (an_index_that_leaves_the_folder, "nothing else is opened"),
        (a_class_of_the_folder, "it is a .*evil.*; needed is a StableDiffusionPipeline"),
        (a_network_of_the_folder, "its unet is a Evil; needed is a UNet2DConditionModel"),
        (a_scheduler_of_the_folder, "its scheduler is a Evil; known are DDIMScheduler"),
        (a_scheduler_that_is_no_name, "its scheduler is a .*evil"),
        (a_pipeline_of_diffusers, "its scheduler is a DiffusionPipeline; known are"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_hostile_folder_ends_in_a_message(
    copied: Path,
    mark: Path,
    network: list[Any],
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    make_hostile(copied, mark)
    spoil(copied)
    with pytest.raises(IncompatibleModelError, match=message) as caught:
        load_pipeline(copied)
    assert str(copied) in str(caught.value)
    assert not mark.exists()
    assert network == []


@pytest.mark.parametrize(
    "file",
    [
        *("unet/config.json", "vae/config.json", "text_encoder/config.json"),
        *("scheduler/scheduler_config.json", "tokenizer/tokenizer.json"),
        *(f"unet/{WEIGHTS}.safetensors", "text_encoder/model.safetensors"),
    ],
)
def test_what_is_missing_is_named(copied: Path, file: str) -> None:
    shutil.rmtree(copied / "tokenizer") if "tokenizer" in file else (copied / file).unlink()
    part, name = file.split("/")
    with pytest.raises(IncompatibleModelError, match=f"{part}.*{name}"):
        read_pipeline(copied)


@pytest.mark.parametrize("part", ["unet/" + WEIGHTS, "vae/" + WEIGHTS, "text_encoder/model"])
def test_incomplete_weights_are_refused(copied: Path, part: str) -> None:
    file = copied / f"{part}.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(IncompatibleModelError, match=name.removeprefix("text_model.")):
        read_pipeline(copied)


@pytest.mark.parametrize("name", ["stranger/model", "hf-hub:stranger/model", "~", "."])
def test_no_name_is_looked_up_anywhere(
    name: str, network: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        IncompatibleModelError, match="There is no model|it has no model_index.json"
    ):
        load_pipeline(name)
    assert network == []


# Memory


def overwrite(file: Path) -> None:
    """In place: who maps the file sees other weights now, or dies."""
    with open(file, "r+b") as opened:
        opened.write(bytes(file.stat().st_size))


def test_weights_are_in_memory_of_their_own(
    copied: Path, pipeline: StableDiffusionPipeline
) -> None:
    loaded = read_pipeline(copied)
    for file in copied.rglob("*.safetensors"):
        overwrite(file)
    assert same_state(state(*parts(pipeline)), *parts(loaded))


def test_the_weights_of_a_network_file_are_in_memory_of_their_own(
    copied: Path, pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    file = tmp_path / "network.safetensors"
    changed = {name: weight + 1 for name, weight in pipeline.unet.state_dict().items()}
    save_file(changed, file)
    loaded = read_pipeline(copied)
    load_network(loaded, file)
    overwrite(file)
    assert same_state([changed], loaded.unet)


def test_a_network_file_is_no_pickle(copied: Path, mark: Path, tmp_path: Path) -> None:
    file = tmp_path / "network.safetensors"
    file.write_bytes(pickle.dumps(Touch(mark)))
    with pytest.raises(IncompatibleModelError, match="holds no UNet of this model"):
        load_network(read_pipeline(copied), file)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        *(("text_encoder/config.json", "num_hidden_layers", n) for n in (10**7, -1, 2.5, True)),
        ("unet/config.json", "layers_per_block", 10**7),
        ("unet/config.json", "layers_per_block", [1, 10**7]),
        ("unet/config.json", "transformer_layers_per_block", [[1], 10**7]),
        ("unet/config.json", "block_out_channels", [32] * 100_000),
        ("vae/config.json", "layers_per_block", 10**7),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
    ],
)
def test_a_few_digits_build_no_giant(copied: Path, file: str, name: str, value: Any) -> None:
    """Without a bound these take minutes, or all memory."""
    change(copied / file, **{name: value})
    with pytest.raises(IncompatibleModelError, match=f"the {name} in its {file}"):
        read_pipeline(copied)


@pytest.mark.parametrize(
    "file",
    [
        *("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"),
        *("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json"),
    ],
)
def test_a_text_of_any_size_is_not_read(copied: Path, file: str) -> None:
    with open(copied / file, "wb") as sparse:
        sparse.truncate(5 << 30)
    with pytest.raises(IncompatibleModelError, match="is larger than"):
        read_pipeline(copied)
