"""What is published: nothing that only the repository needs, and every word that a scanner of the
registry looks at is in the table of docs/registry.md with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from support.archive import ROOT, shipped_files

pytestmark = pytest.mark.any_version

PATTERNS: Mapping[str, str] = {
    "eval": r"eval\s*\(",
    "exec": r"\bexec\s*\(",
    "compile": r"(?<!re\.)\bcompile\s*\(",
    "computed import": r"__import__|\bimportlib\b(?!\")|\brunpy\b",
    "process": r"\bsubprocess\b|\bos\.(system|popen|exec|spawn)|\bpopen\b|\bpexpect\b",
    "pip": r"\bpip\b",
    "pickle": r"(?i)pickl",
    "torch.load": r"torch\.load\s*\(|allow_pickle|\bmarshal\b|\bshelve\b|\bdill\b",
    "encoding": r"\bbase64\b|\bb64\w*|\batob\b|\bbtoa\b|\bzlib\b|\bcodecs\b|fromhex",
    "network": r"\burllib\b|\bhttp\.client\b|\brequests\b(?=[.\s]*(get|post|Session))|\bsocket\.",
    "hub": r"(?i)huggingface|hf.hub|trust_remote_code|from_pretrained|snapshot_download",
    "environment": r"\bos\.environ|\bgetenv\b",
    "native code": r"\bctypes\b|\bcffi\b",
    "page": r"(inner|outer|Adjacent)HTML|document\.write|new Function|\bon(load|error)\b",
    "bare except": r"except\s*(Exception)?\s*:\s*(#.*)?\n\s*(pass|continue)",
}
"""Name in the table → what the scanners of registries and of Bandit look at, as far as known."""
ROW = re.compile(
    r"^\| `(?P<file>[^`]+)` \| (?P<pattern>[^|]+) \| (?P<reason>[^|]+) \|$", re.MULTILINE
)


def found_in(text: str) -> set[str]:
    return {name for name, pattern in PATTERNS.items() if re.search(pattern, text)}


def test_what_a_scanner_sees_is_explained_and_nothing_else() -> None:
    table = ROW.findall((ROOT / "docs" / "registry.md").read_text(encoding="utf-8"))
    explained = {(file, pattern.strip()) for file, pattern, _ in table}
    assert len(explained) == len(table), "a row is there twice"
    assert all(len(reason.strip()) > 20 for *_, reason in table)
    found = set()
    for name in shipped_files():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        found |= {(name, pattern) for pattern in found_in(text)}
    assert found == explained


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("value = eval(text)", "eval"),
        ("model.eval()", "eval"),
        ("retrieval(1)", "eval"),
        ("exec(code)", "exec"),
        ("pattern.exec (text)", "exec"),
        ("compile(source, '', 'exec')", "compile"),
        ("importlib.import_module(name)", "computed import"),
        ("from subprocess import run", "process"),
        ("os.system('ls')", "process"),
        ("run('pip install x')", "pip"),
        ("from pickle import loads", "pickle"),
        ("torch.load(path)", "torch.load"),
        ("base64.b64decode(x)", "encoding"),
        ("from urllib.request import urlopen", "network"),
        ("requests.get(address)", "network"),
        ("Model.from_pretrained(name)", "hub"),
        ("os.environ['HOME']", "environment"),
        ("element.innerHTML = text", "page"),
        ("try:\n    x()\nexcept Exception:\n    pass\n", "bare except"),
    ],
)
def test_each_pattern_finds_what_it_is_for(text: str, name: str) -> None:
    assert name in found_in(text)


def test_ordinary_code_is_not_found() -> None:
    assert not found_in("re.compile(r'x')\nretrieve(evaluation)\nexecute(node)\nmodel.train(False)")


def test_nothing_is_shipped_that_only_the_repository_needs() -> None:
    names = shipped_files()
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert folders == {
        *("attention", "cli", "composition", "compression", "concept", "diffusion"),
        *("evaluation", "example_workflows", "formats", "host"),
        *("inspection", "locales", "pictures"),
        *("merge", "nodes", "trainer", "web"),
    }
    assert {name for name in names if "/" not in name} == {
        *("LICENSE", "README.md", "__init__.py", "__main__.py", "pyproject.toml"),
        "requirements.txt",
    }
    assert not [name for name in names if name.endswith((".pyc", ".safetensors", ".log"))]
    assert any(name.startswith("web/docs/") for name in names)  # the help of the nodes


def test_nodes_never_need_what_is_left_out() -> None:
    """The demo's model stays out of the archive; only commands use it, and they say so."""
    outside = re.compile(r"from \.+(miniature|tests|benchmarks)\b|import_module")
    users = [
        name
        for name in shipped_files()
        if name.endswith(".py") and outside.search((ROOT / name).read_text(encoding="utf-8"))
    ]
    assert {name.split("/")[0] for name in users} == {"cli"}
