"""Every call of the pack that lets a library open something, and what keeps it from running,
downloading or trusting what lies there: a walk over the files, and over calls that it must find.

What a graph, a command or a file names reaches such calls. So each of them has to say that it opens
local files only, or which kinds of files it takes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from types import EllipsisType

import pytest
from support.pack import ROOT, pack_files

pytestmark = pytest.mark.any_version

NEEDED: Mapping[str, Mapping[str, bool | EllipsisType]] = {
    "from_pretrained": {"local_files_only": True},
    "Image.open": {"formats": ...},
    "np.load": {"allow_pickle": False},
    "numpy.load": {"allow_pickle": False},
}
"""Call → arguments it must have; `...` stands for any value."""
FORBIDDEN = {
    *("torch.load", "pickle.load", "pickle.loads", "Unpickler", "marshal.loads", "shelve.open"),
    *("eval", "exec", "compile", "__import__", "import_module", "spec_from_file_location"),
    *("create_model", "create_model_and_transforms", "create_model_from_pretrained"),
    *("get_tokenizer", "HFTokenizer", "load_checkpoint", "load_state_dict_from_url"),
    *("hf_hub_download", "snapshot_download", "download_url_to_file", "urlopen", "urlretrieve"),
    *("from_single_file", "load_lora_weights", "load_textual_inversion", "AutoTokenizer"),
    *("AutoModel", "AutoPipelineForText2Image", "get_class_from_dynamic_module"),
    *("subprocess.run", "subprocess.Popen", "os.system", "os.popen", "os.execv"),
}
"""Calls that open or run whatever they are pointed at. Those without a dot are found however the
name before it is called, but for `model.eval()` and `re.compile(...)`.
"""
FORBIDDEN_WORDS = ("trust_remote_code", "hf-hub:", "local-dir:", "custom_pipeline")
METHODS_OF_OTHERS = {"eval", "compile"}


def unguarded(source: str, file: str) -> list[str]:
    """Calls of a file that would open something without the guard they need."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = _name(node.func)
            found += [f"{file}:{node.lineno} calls {name}{wrong}" for wrong in _wrong(name, node)]
    documentation = {id(text) for text in _free_standing_texts(tree)}
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else getattr(node, "arg", None)
        if isinstance(text, str) and id(node) not in documentation:
            found += [f"{file} says {word}" for word in FORBIDDEN_WORDS if word in text]
    return found


def _wrong(name: str, call: ast.Call) -> Iterator[str]:
    last = name.rpartition(".")[2]
    method_of_other = "." in name and last in METHODS_OF_OTHERS
    if name in FORBIDDEN or (last in FORBIDDEN and not method_of_other):
        yield ", which opens or runs whatever it is pointed at"
    arguments = {keyword.arg: keyword.value for keyword in call.keywords}
    needed = NEEDED.get(name) or NEEDED.get(last) or {}
    for argument, value in needed.items():
        present = arguments.get(argument)
        if present is None or (value is not ... and ast.unparse(present) != str(value)):
            yield f" without {argument}={value}"


def _name(function: ast.expr) -> str:
    """`a.b.c` of a call of that, and `.c` where it is called on what another call returns."""
    if isinstance(function, ast.Attribute):
        return f"{_name(function.value)}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ""


def _free_standing_texts(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value


def test_nothing_is_opened_without_a_guard() -> None:
    found = [
        call
        for path in pack_files()
        if path.name != "dev.py"  # sets up a checkout; is not installed
        for call in unguarded(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "open_clip.create_model(name, pretrained=weights)",
        "get_tokenizer(name)",
        "CLIPTokenizer.from_pretrained(folder)",
        "StableDiffusionPipeline.from_pretrained(folder, local_files_only=False)",
        "X.from_pretrained(folder, local_files_only=True, trust_remote_code=True)",
        "torch.load(path, weights_only=True)",
        "Image.open(path)",
        "def f():\n    with Image.open(io.BytesIO(x)) as image:\n        pass",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "name = 'hf-hub:' + repository",
        "pickle.loads(content)",
        "eval(text)",
        "builder().from_pretrained(folder)",
    ],
)
def test_the_walk_finds_a_call_without_its_guard(source: str) -> None:
    assert unguarded(f"import os\n{source}\n", "x.py")


@pytest.mark.parametrize(
    "source",
    [
        "CLIPTokenizer.from_pretrained(folder, local_files_only=True)",
        "Image.open(path, formats=FORMATS)",
        "np.load(path, mmap_mode='r', allow_pickle=False)",
        "re.compile('x')",
        "clip.eval()",
        "build(clip).eval()",
        '"""speaks of hf-hub: names"""',
    ],
)
def test_the_walk_allows_a_guarded_call(source: str) -> None:
    assert unguarded(source, "x.py") == []
