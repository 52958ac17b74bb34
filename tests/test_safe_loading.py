"""Nothing that is loaded can run code: no pickles, and no code from a model's repository."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("backends", "bench", "cluster", "deployments", "scenes", "stages", "training")
UNPICKLE = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}


def unsafe(source: str) -> Iterator[str]:
    """What in a module's source loads pickles, or runs code that comes with weights."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.partition(".")[0] in UNPICKLE)
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in UNPICKLE:
                yield module
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                yield "torch.load"
            case ast.keyword(arg="trust_remote_code"):
                yield "trust_remote_code"
            case ast.keyword(arg="use_safetensors", value=ast.Constant(value=False)):
                yield "use_safetensors=False"
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                yield "allow_pickle=True"
            case ast.Call(func=ast.Name(id="eval" | "exec")):
                yield "eval"


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_loads_code_with_weights(room: str) -> None:
    found = {str(path): list(unsafe(path.read_text())) for path in (ROOT / room).rglob("*.py")}
    assert found
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "f(trust_remote_code=True)",
        "f(use_safetensors=False)",
        "numpy.load('x', allow_pickle=True)",
        "eval('x')",
    ],
)
def test_what_loads_code_would_be_found(source: str) -> None:
    assert list(unsafe(source))
