"""What Gaudi's backend uses of `habana_frameworks`, against how optimum-habana uses it, which runs on the device.

Only the sources are read, of the environment that GAUDI_PYTHON names.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from backends import gaudi

VENDOR = "habana_frameworks"


@dataclass(frozen=True)
class Use:
    """A call of the vendor's, with its positional arguments as they are named there."""

    name: str
    arguments: tuple[str, ...]
    keywords: frozenset[str]


def read_uses(source: str) -> Iterator[Use]:
    """The calls of the vendor's functions in a module."""
    tree = ast.parse(source)
    names = {"torch.hpu": f"{VENDOR}.torch.hpu"}  # PyTorch's name of that module
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            owner, _, attribute = ast.unparse(node.func).rpartition(".")
            name = f"{names.get(owner, owner)}.{attribute}" if owner else names.get(attribute, attribute)
            if name.startswith(VENDOR):
                arguments = tuple(ast.unparse(argument) for argument in node.args)
                yield Use(name, arguments, frozenset(keyword.arg or "" for keyword in node.keywords))


def read_strings(source: str) -> set[str]:
    return {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@pytest.fixture(scope="module")
def sources(gaudi_python: str) -> dict[str, str]:
    """The modules of optimum-habana, and transformers' checks of what is installed, by path."""
    program = "import importlib.util as u; print(*u.find_spec('optimum').submodule_search_locations, sep='\\n')"
    found = subprocess.run([gaudi_python, "-c", program], capture_output=True, text=True, check=True, timeout=60).stdout
    (root,) = {Path(line) for line in found.splitlines() if (Path(line) / "habana").is_dir()}
    files = [*(root / "habana").rglob("*.py"), root.parent / "transformers" / "utils" / "import_utils.py"]
    return {str(file.relative_to(root.parent)): file.read_text() for file in files}


@pytest.fixture(scope="module")
def theirs(sources: dict[str, str]) -> list[Use]:
    return [use for source in sources.values() if VENDOR in source for use in read_uses(source)]


OURS = list(read_uses(Path(gaudi.__file__).read_text()))


def test_the_backend_uses_the_vendors_library() -> None:
    assert {use.name.removeprefix(f"{VENDOR}.torch.") for use in OURS} == {
        "core.mark_step", "hpex.kernels.FusedSDPA.apply", "hpu.is_available", "hpu.memory_stats", "hpu.synchronize",
    }  # fmt: skip


@pytest.mark.parametrize("use", OURS, ids=lambda use: use.name)
def test_a_function_is_there_and_takes_as_many_arguments(theirs: list[Use], use: Use) -> None:
    alike = [each for each in theirs if each.name == use.name]
    assert any(len(each.arguments) >= len(use.arguments) and each.keywords >= use.keywords for each in alike)


def test_attention_takes_its_arguments_in_this_order(sources: dict[str, str]) -> None:
    """As a module there names them that only passes them on."""
    (use,) = [use for use in OURS if use.name.endswith("FusedSDPA.apply")]
    source = sources["optimum/habana/transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py"]
    (passes,) = [
        function.args.args
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "ModuleFusedSDPA"
        for function in node.body
        if isinstance(function, ast.FunctionDef) and function.name == "forward"
    ]
    named = [argument.arg.replace("casual", "causal") for argument in passes[1:]]
    assert named[: len(use.arguments)] == list(use.arguments)


def test_attention_takes_truth_values_that_are_the_same_for_every_head_and_query(sources: dict[str, str]) -> None:
    """As the language model's vision part there passes them."""
    source = sources["optimum/habana/transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py"]
    for line in (
        "attention_mask = attention_mask.bool().to(device=self.device)",
        "attention_mask = attention_mask.reshape(1, 1, 1, seq_len)",
        "a_i = attn_mask[:, :, :, start_idx:end_idx]",
        'self.fused_scaled_dot_product_attention(q_i, k_i, v_i, a_i, 0.0, False, None, "None")',
    ):
        assert line in source


def test_settings_and_statistics_have_these_names(sources: dict[str, str]) -> None:
    assert {"InUse", "Limit"} <= read_strings(sources["optimum/habana/utils/misc.py"])
    modes = read_strings(sources["optimum/habana/transformers/training_args.py"])
    assert {"PT_HPU_LAZY_MODE", "hpu_backend"} <= modes & read_strings(Path(gaudi.__file__).read_text())
