"""DESIGN section 3: which module stands on which layer, and that imports, those inside functions too, go only down."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qmica"

LAYERS = (
    {"errors"},
    {"templates"},
    {
        "allocator",
        "config",
        "catalog",
        "checkpointing",
        "durable",
        "loss",
        "gram",
        "llamacpp",
        "gguf_file",
        "mapping",
        "rope",
        "samples",
    },
    {"architectures", "ggml"},
    {"subspace", "store", "imatrix", "unpacking", "source", "targets", "packing", "records", "progress"},
    {"quant", "weights", "tokenizer", "runs", "bases", "survival"},
    {"linear", "data", "memory", "quantized", "window"},
    {"model", "streaming", "ollama"},
    {"adapter", "pace", "kernels"},
    {"budget", "verification"},
    {
        "training",
        "evaluation",
        "merging",
        "exporting",
        "chatting",
        "doctor",
        "inventory",
        "compensation",
        "spectra",
        "planning",
    },
    {"__init__", "__main__", "cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# imports within a layer: a job that is made of another, and the face that starts the other
SIDEWAYS = {("exporting", "merging"), ("exporting", "compensation"), ("__main__", "cli")}
ONLY = {"bitsandbytes": "quant", "xllamacpp": "llamacpp"}
LIGHT = {
    "errors",
    "config",
    "catalog",
    "durable",
    "cli",
    "__init__",
    "__main__",
}  # no torch where the module is imported
HEAVY = {"torch", "transformers", "bitsandbytes", "accelerate", "datasets", "gguf", "numpy"}
BANNED = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
VAGUE = {"utils", "util", "common", "core", "helpers", "misc"}

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported, relative imports resolved: `from . import quant` is qmica.quant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["qmica" if node.level else "", node.module or ""]))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def inside(names: Iterator[str]) -> set[str]:
    """The modules of qmica among dotted names, wherever in them a name stands; `qmica` alone is the package itself."""
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "qmica":
            module = parts[1] if len(parts) > 1 and parts[1] in {*LEVEL, *MODULES} else "__init__"
            found.add(module)
    return found


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def violations(module: str, tree: ast.AST) -> list[str]:
    """Imports of `module` that do not go down."""
    level = LEVEL[module]
    return [
        f"{module} (layer {level}) imports {other} (layer {LEVEL.get(other)})"
        for other in sorted(inside(imports(tree)))
        if LEVEL.get(other, level) >= level and (module, other) not in SIDEWAYS
    ]


def test_every_module_has_a_layer():
    assert set(MODULES) - set(LEVEL) == set(), "give it a layer here and in DESIGN section 3"
    assert not VAGUE & set(MODULES)
    assert not [path for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py"))], "the house is flat"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    assert violations(module, tree_of(module)) == []


@pytest.mark.parametrize(
    "line",
    [
        "from . import model",
        "from .model import load",
        "import qmica.model",
        "import qmica.model as m",
        "from qmica import model",
        "from qmica import load",  # the API is layer 7
        "import qmica",
        "def f():\n    from qmica.model import load",
        "if True:\n    from qmica import subspace, model",
        "from qmica import weights",  # the same layer
    ],
)
def test_the_reader_sees_every_way_to_import(line):
    assert len(violations("quant", ast.parse(line))) == 1


@pytest.mark.parametrize("line", ["from . import subspace", "from qmica.errors import QmicaError", "import torch.nn"])
def test_the_reader_lets_the_others_pass(line):
    assert violations("quant", ast.parse(line)) == []


@pytest.mark.parametrize("module", MODULES)
def test_engines_have_one_importer(module):
    roots = {name.split(".")[0] for name in imports(tree_of(module))}
    assert [(engine, module) for engine, only in ONLY.items() if engine in roots and module != only] == []


@pytest.mark.parametrize("module", sorted(LIGHT & set(MODULES)))
def test_light_modules_import_nothing_heavy_at_the_top(module):
    tree = tree_of(module)
    top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert {name.split(".")[0] for name in imports(top)} & HEAVY == set()


@pytest.mark.parametrize("module", MODULES)
def test_nothing_that_runs_foreign_code(module):
    tree = tree_of(module)
    found = [name for name in imports(tree) if name.split(".")[0] in BANNED]
    found += [
        ast.unparse(node)
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"))
        or (isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False")
        or (isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec", "compile"))
    ]
    assert found == []


@pytest.mark.parametrize("module", MODULES)
def test_no_swallowed_errors_and_nothing_unfinished(module):
    text = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    assert re.findall(r"\b(?:TODO|FIXME|XXX|NotImplementedError)\b", text) == []
    swallowed = [
        f"line {node.lineno}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (ast.unparse(node.type) in ("Exception", "BaseException") and _does_nothing(node)))
    ]
    assert swallowed == []


def _does_nothing(handler: ast.ExceptHandler) -> bool:
    return all(isinstance(node, ast.Pass | ast.Continue | ast.Constant) for node in handler.body)


@pytest.mark.parametrize("module", MODULES)
def test_modules_say_what_they_do(module):
    text = ast.get_docstring(tree_of(module))
    assert text and len(text) > 40, f"{module}.py opens without saying what it does"
