"""Looks for files that a reader cannot cope with: `python tests/fuzz/readers.py CORPUS [libFuzzer's
options]`, in an environment with `pip install atheris` and this package.

A reader may return a concept or raise an error of ours that names the file. Everything else is a
finding: another exception, a hang, or memory beyond `-rss_limit_mb`. Some inputs are the bytes of a
file, mutated from one small file of each format; the others describe tensors whose names, shapes
and numbers are put together from what the formats use, so that they come past the containers, or
instructions of a pickle, or odd values in a header.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["custom_diffusion"]):
    from custom_diffusion.concept.concept import Concept, ModifierToken
    from custom_diffusion.concept.delta import DenseDelta, LowRankDelta
    from custom_diffusion.concept.errors import CustomDiffusionError
    from custom_diffusion.concept.file import read_concept, write_concept
    from custom_diffusion.concept.header import FORMAT
    from custom_diffusion.concept.layers import FAMILIES
    from custom_diffusion.concept.plain import is_plain
    from custom_diffusion.formats.base import BaseModel, read_base
    from custom_diffusion.formats.exporting import FORMATS, export_concept
    from custom_diffusion.formats.importing import open_concept
    from custom_diffusion.inspection.any_card import read_any_card
    from custom_diffusion.inspection.card import ConceptCard

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import pickles

LAYERS = [
    f"{block}.1.transformer_blocks.0.attn2.to_{matrix}"
    for block in ("input_blocks.2", "output_blocks.3")
    for matrix in "kv"
]
WIDTH, OUT = 128, 6
PREFIXES = (
    *("", "diffusion_model.", "model.diffusion_model.", "unet.", "base_model.model."),
    "bundle_emb.<a>.",
)
MODULES = (
    *LAYERS,
    "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn2.processor.to_k_custom_diffusion",
    "up_blocks.99999999999999999999.attentions.1.transformer_blocks.0.attn2.to_v",
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
)
PARTS = (
    *(".weight", ".diff", ".lora_up.weight", ".lora_down.weight", ".lora_A.weight"),
    *(".lora_B.weight", ".alpha", ".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b"),
    *(".lokr_w1", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b", ".US", ".Vh", ""),
    *(".dora_scale", ".lora_magnitude_vector", ".string_to_param.*", ".clip_l", ".clip_g"),
    *(".oft_blocks", ".rescale", ".on_input", ".ia3_l", ".diff_b", ".lora_B.bias", ".clip_l_out"),
    *(".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight", ".strange.weight"),
)
KINDS: tuple[dict[str, tuple[int, ...]], ...] = (
    {".lora_up.weight": (OUT, 2), ".lora_down.weight": (2, WIDTH), ".alpha": ()},
    {".lora_B.weight": (OUT, 2), ".lora_A.weight": (2, WIDTH)},
    {".lokr_w1": (2, 2), ".lokr_w2": (OUT // 2, WIDTH // 2)},
    {".diff": (OUT, WIDTH)},
    {".weight": (OUT, WIDTH)},
    {".weight": (OUT,), ".on_input": ()},
    {".ia3_l": (1, WIDTH)},
    {".oft_blocks": (3, OUT // 3, OUT // 3), ".rescale": (OUT, 1), ".alpha": ()},
    {".a1.weight": (WIDTH, 2), ".a2.weight": (2, WIDTH), ".b1.weight": (OUT, 2)}
    | {".b2.weight": (2, WIDTH), ".alpha": ()},
)
"""Modules with all that they need"""
MAGNITUDES = ((OUT,), (OUT, 1), (1, WIDTH), (WIDTH,), (WIDTH, 1), ())
NUMBERS = (0.0, 0.01, 1.0, 2.5, 11.0, -1e30, math.inf, math.nan)
"""Among them the norms of the base's columns and rows, nearly"""
SHARD = "model-1.safetensors"
SHARDS = (SHARD, SHARD, "file.safetensors", "missing.safetensors", "../up", "C:x", "", "..", "\x00")
WHOLE = ("emb_params", "<new1>", "clip_l", "clip_g", "embed", "*")
SIZES = (0, 1, 2, 3, OUT, WIDTH, 768, 1280, 2048)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)
TEXTS = (
    "",
    "{}",
    "[]",
    "3",
    '{"unet.lora_alpha": []}',
    '{"entries": {}}',
    "[[" * 5000,
    '{"unet.lora_alpha": 8}',
    '{"unet.lora_alpha": 8, "unet.use_dora": true, "unet.use_rslora": true}',
    '{"lora_alpha": 8, "alpha_pattern": {"to_k": 2, "(a|.*)+": 3, ".*attn2.to_[kv]": 1}}',
    '{"lora_alpha": 8, "peft_type": "LOKR", "r": 0, "use_rslora": true}',
    "\x00",
)


def base() -> BaseModel:
    draw = torch.Generator().manual_seed(0)
    return BaseModel({layer: torch.randn(OUT, WIDTH, generator=draw) for layer in LAYERS})


def write_seeds(folder: Path) -> None:
    """One small file of each format."""
    token = ModifierToken("<new1>", "cat", {"clip_l": torch.ones(1, WIDTH)})
    dense = {layer: DenseDelta(torch.full((OUT, WIDTH), 0.01)) for layer in LAYERS}
    thin = {
        layer: LowRankDelta(torch.full((OUT, 2), 0.01), torch.ones(2, WIDTH)) for layer in LAYERS
    }
    for name, deltas in (("dense", dense), ("thin", thin)):
        concept = Concept(FAMILIES["miniature"], deltas, (token,))
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_concept(concept, folder / name / "own.safetensors")
        for kind, format in FORMATS.items():
            if name == "thin" or not format.needs_low_rank:
                export_concept(concept, folder / name / kind, kind, base(), number_if_taken=True)


def described(data: atheris.FuzzedDataProvider, path: Path) -> None:
    """Writes the file that the bytes describe."""
    tensors: dict[str, Any] = {}
    for layer in LAYERS:
        if data.ConsumeBool():
            parts = dict(data.PickValueInList(list(KINDS)))
            if data.ConsumeBool():
                names = [".dora_scale", ".lora_magnitude_vector"]
                parts[data.PickValueInList(names)] = data.PickValueInList(list(MAGNITUDES))
            for part, shape in parts.items():
                tensors[layer + part] = torch.full(shape, data.PickValueInList(list(NUMBERS)))
    for _ in range(data.ConsumeIntInRange(0 if tensors else 1, 8)):
        if data.ConsumeBool():
            name = data.PickValueInList(list(WHOLE))
        else:
            pieces = (PREFIXES, MODULES, PARTS)
            name = "".join(data.PickValueInList(list(piece)) for piece in pieces)
        shape = [data.PickValueInList(list(SIZES)) for _ in range(data.ConsumeIntInRange(0, 3))]
        if math.prod(shape) < 1 << 20:
            number = data.PickValueInList(list(NUMBERS))
            dtype = data.PickValueInList(list(DTYPES))
            tensors[name] = torch.full(shape, number).to(dtype)
    if data.ConsumeBool():
        nest = data.PickValueInList(["state_dict", "unet", "modifier_token", "string_to_param"])
        value: Any = {nest: tensors, "params": {"unet": tensors}, "modifier_token": tensors}
        torch.save(value, path)
        return
    header = {
        name: data.PickValueInList([*TEXTS, data.ConsumeUnicodeNoSurrogates(20)])
        for name in ("json", "lora_adapter_metadata", "tokens", "provenance", "constraint_prompts")
        if data.ConsumeBool()
    }
    if data.ConsumeBool():
        header |= {"format": FORMAT, "format_version": "1.0", "base_family": "miniature"}
        words = [{"name": "<a>", "class_noun": data.PickValueInList(["", "cat"])}]
        header.setdefault("tokens", json.dumps(words))
    save_file(tensors, path, header)


NAMES = (
    *(("torch._utils", f"_rebuild_{what}") for what in ("tensor_v2", "tensor_v3", "parameter")),
    *(("torch", f"{kind}Storage") for kind in ("Float", "Half", "Bool", "Untyped")),
    *(("torch.storage", "UntypedStorage"), ("torch", "float8_e4m3fn"), ("torch", "float16")),
    *(("collections", "OrderedDict"), ("torch", "Size"), ("torch", "device"), ("os", "system")),
    *(("__builtin__", "set"), ("torch.nn.modules.container", "ParameterDict")),
)
KEYS = ("unet", "modifier_token", "state_dict", "embed", "string_to_param", "*", "<a>", "params")
INSTRUCTIONS = (
    *(b"(", b")", b"}", b"]", b"N", b"\x88", b"\x89", b"a", b"e", b"s", b"u", b"t", b"\x85"),
    *(b"\x86", b"\x87", b"R", b"\x81", b"b", b"Q", b"\x94", b"\x93", b"0", b"2", b"\x8f", b"\x90"),
)


def described_pickle(data: atheris.FuzzedDataProvider, path: Path) -> None:
    """An archive of instructions put together at random, of which many make sense: a mapping of
    values that stand for themselves, tensors, and what lies in the memo, itself among them.
    """
    content = b"\x80\x02}q\x00("
    for _ in range(data.ConsumeIntInRange(0, 40)):
        kind = data.ConsumeIntInRange(0, 9)
        if kind == 0:
            content += data.PickValueInList(list(INSTRUCTIONS))
        elif kind == 1:
            content += pickles.text(data.PickValueInList([*KEYS, *LAYERS, *WHOLE]))
        elif kind == 2:
            content += pickles.name(*data.PickValueInList(list(NAMES)))
        elif kind == 3:
            content += pickles.number(data.PickValueInList([*SIZES, -1, 1 << 31, 1 << 62, 1 << 64]))
        elif kind in (4, 5):
            content += data.PickValueInList([b"h", b"q"]) + bytes([data.ConsumeIntInRange(0, 9)])
        elif kind == 6:
            content += pickles.storage(
                data.PickValueInList(["0", "1", "2"]), data.PickValueInList(list(SIZES))
            )
        elif kind in (7, 8):
            rank = data.ConsumeIntInRange(0, 3)
            sizes = [data.PickValueInList(list(SIZES)) for _ in range(rank)]
            strides = [data.PickValueInList(list(SIZES)) for _ in range(rank)]
            content += pickles.text(data.PickValueInList([*KEYS, *LAYERS]))
            content += pickles.tensor(
                pickles.sizes(*sizes),
                pickles.sizes(*strides),
                data.ConsumeIntInRange(0, 9),
                pickles.storage("1", 2 * WIDTH),
            )
        else:
            content += data.ConsumeBytes(4)
    content += data.PickValueInList([b"u.", b"."])
    pickles.write_archive(path, content, {"0": bytes(16), "1": bytes(8 * WIDTH), "2": b""})


def described_header(data: atheris.FuzzedDataProvider, path: Path) -> None:
    """A .safetensors whose header is JSON of odd values, or whose concept's texts are."""
    odd = ["NaN", "-Infinity", "1e999", "9" * 400, "[]", "{}", "null", "true", '"\\ud800"', "-1"]
    odd += ["[" * 200 + "]" * 200, '"F32"', "[1]", "[0,4]", "[4,0]", '"a\\u001b"', "[1,1,1]", "0"]
    pick = lambda: data.PickValueInList(odd)  # noqa: E731
    entries = [
        f'"{data.PickValueInList([*LAYERS, "a", "__metadata__", "bundle_emb.<a>.clip_l"])}":'
        f'{{"dtype":{data.PickValueInList([pick(), chr(34) + "F32" + chr(34)])},'
        f'"shape":{pick()},"data_offsets":{pick()}}}'
        for _ in range(data.ConsumeIntInRange(0, 3))
    ]
    known = {"format": FORMAT, "format_version": "1.0", "base_family": "miniature"}
    texts = {
        "tokens": f'[{{"name":{data.PickValueInList([pick(), chr(34) + "<a>" + chr(34)])},'
        f'"class_noun":{pick()}}}]',
        "provenance": f'{{"method":{pick()},"steps":{pick()}}}',
        "constraint_prompts": f"[{pick()}]",
    }
    chosen = {key: text for key, text in texts.items() if data.ConsumeBool()}
    entries.append(f'"__metadata__":{json.dumps({**known, **chosen})}')
    content = ("{" + ",".join(entries) + "}").encode()
    body = bytes(data.PickValueInList([0, 4, 8]))
    path.write_bytes(len(content).to_bytes(8, "little") + content + body)


def described_index(data: atheris.FuzzedDataProvider) -> str:
    """Names shards, of which one is there."""
    shards = [*SHARDS, data.ConsumeUnicode(20), 3, None]
    names = [data.PickValueInList(shards) for _ in range(data.ConsumeIntInRange(0, 4))]
    weights: Any = {str(number): name for number, name in enumerate(names)}
    return json.dumps({data.PickValueInList(["weight_map", "a"]): weights or names})


def read_one_index(content: bytes) -> None:
    path = FOLDER / "model.safetensors.index.json"
    if content[:1] == b"\xff":
        path.write_text(described_index(atheris.FuzzedDataProvider(content[1:])))
    else:
        path.write_bytes(content)
    try:
        read_base(path)
    except CustomDiffusionError as error:
        assert ".safetensors" in str(error)


def test_one_input(content: bytes) -> None:
    path = FOLDER / "file.safetensors"
    if content[:1] == b"\xfe":
        read_one_index(content[1:])
        return
    describe = DESCRIPTIONS.get(content[:1])
    if describe:
        describe(atheris.FuzzedDataProvider(content[1:]), path)
    else:
        path.write_bytes(content)
    for read in (
        lambda: open_concept(path, BASE),
        lambda: read_any_card(path),
        lambda: read_concept(path),
        lambda: read_base(path),
    ):
        try:
            answer = read()
        except CustomDiffusionError as error:
            assert path.name in str(error) and is_plain(str(error).replace("\n", ""))
            continue
        if isinstance(answer, ConceptCard):
            json.dumps(answer.as_json(), allow_nan=False, ensure_ascii=False).encode()


DESCRIPTIONS = {b"\xff": described, b"\xfd": described_pickle, b"\xfc": described_header}


if __name__ == "__main__":
    torch.set_num_threads(1)
    BASE = base()
    with tempfile.TemporaryDirectory() as folder:
        FOLDER = Path(folder)
        save_file({f"{k}.weight": w for k, w in BASE.weights.items()}, FOLDER / SHARD)
        corpus = next((Path(a) for a in sys.argv[1:] if not a.startswith("-")), None)
        if corpus and not any(corpus.glob("*")):
            write_seeds(FOLDER / "seeds")
            corpus.mkdir(exist_ok=True)
            for number, file in enumerate(sorted((FOLDER / "seeds").rglob("*.*"))):
                if file.is_file():
                    (corpus / f"{number:02}-{file.name}").write_bytes(file.read_bytes())
            (corpus / "described").write_bytes(b"\xff" + bytes(range(200)))
            (corpus / "described-pickle").write_bytes(b"\xfd" + bytes(range(250)))
            (corpus / "described-header").write_bytes(b"\xfc" + bytes(range(250)))
            (corpus / "described-index").write_bytes(b"\xfe\xff" + bytes(range(200)))
            index = json.dumps({"weight_map": {"a": SHARD}})
            (corpus / "index").write_bytes(b"\xfe" + index.encode())
        atheris.Setup(sys.argv, test_one_input)
        atheris.Fuzz()
