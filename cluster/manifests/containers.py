"""Container files: for each pool an image that holds Ray, the project and the device's own torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import requires, version

from cluster.manifests.layout import Layout
from cluster.pools import Pool
from deployments import PROXY_CALLBACK

PYTHON = "3.12"  # of all images, since the nodes of a cluster must agree
_DISTRIBUTION = "three-stage-images"


@dataclass(frozen=True)
class Instruction:
    """A line of a container file, and a comment above it.

    Attributes:
        keyword: what kind of instruction.
        argument: a command as its words, which no shell reads, or text.
        comment: why it is there.
    """

    keyword: str
    argument: str | Sequence[str]
    comment: str = ""

    def __str__(self) -> str:
        argument = self.argument if isinstance(self.argument, str) else json.dumps(list(self.argument))
        return f"# {self.comment}\n{self.keyword} {argument}" if self.comment else f"{self.keyword} {argument}"


def render(layout: Layout) -> dict[str, str]:
    """Render container files by name, one for each pool."""
    return {f"{group.name}.Containerfile": _file(group.name, group.pool) for group in layout.groups}


def _file(name: str, pool: Pool) -> str:
    title = f"# Nodes of pool {name}: docker build --file {name}.Containerfile --tag {pool.environment.image} ."
    build = _gaudi() if pool.backend == "gaudi" else _locked(_torch(pool.backend))
    instructions = [
        *build,
        Instruction("ENV", " ".join(f"{variable}={value}" for variable, value in PROXY_CALLBACK.items())),
        Instruction(
            "RUN",
            'TORCH_DEVICE_BACKEND_AUTOLOAD=0 python -c "import deployments.app"',
            "What Serve imports on any node; the build has no device.",
        ),
    ]
    return "\n".join([title, "", *map(str, instructions), ""])


def _torch(backend: str) -> tuple[str, str]:
    """Return what pip installs as a backend's torch, empty if it must be named, and a comment."""
    torch = f"torch=={version('torch').partition('+')[0]}"
    return {
        "cpu": (torch, "A build for processors alone is smaller: name one, such as the URL of a wheel."),
        "cuda": (torch, "The build on PyPI is for CUDA."),
        "rocm": ("", "Must name a build for ROCm, such as the URL of a wheel."),
        "tpu": (f"{torch} torch-tpu==0.2.0", "TorchTPU."),
        "xla": ("torch==2.9.1 torch-xla[tpu]==2.9.0", "The last release of PyTorch/XLA, which takes this torch alone."),
    }[backend]


def _locked(torch: tuple[str, str]) -> list[Instruction]:
    """Install the lock file's versions beside a torch."""
    default, comment = torch
    return [
        Instruction("FROM", f"python:{PYTHON}"),
        Instruction("WORKDIR", "/app"),
        Instruction("ARG", f'TORCH="{default}"' if default else "TORCH", comment),
        Instruction("RUN", "pip install --no-cache-dir ${TORCH:?must name a build of torch}"),
        Instruction("COPY", "requirements.lock ."),
        Instruction("RUN", "pip install --no-cache-dir --require-hashes --requirement requirements.lock"),
        Instruction("COPY", ". ."),
        Instruction("RUN", "pip install --no-cache-dir --no-deps --no-build-isolation --editable ."),
    ]


def _gaudi() -> list[Instruction]:
    """Add the project to the vendor's container, whose torch and optimum-habana's own versions stay."""
    theirs = {"accelerate", "diffusers", "torch", "transformers"}
    ours = [
        f"ray[serve]=={version('ray')}" if name == "ray" else requirement
        for requirement in requires(_DISTRIBUTION) or ()
        if "extra ==" not in requirement and (name := re.split(r"[^\w-]", requirement)[0]) not in theirs
    ]
    check = f"import sys; assert '%d.%d' % sys.version_info[:2] == '{PYTHON}', sys.version"
    return [
        Instruction("ARG", "BASE", f"Must name Intel's container of PyTorch for Gaudi with Python {PYTHON}."),
        Instruction("FROM", "${BASE}"),
        Instruction("WORKDIR", "/app"),
        Instruction("RUN", ["python", "-c", check]),
        Instruction("RUN", ["pip", "install", "--no-cache-dir", "optimum-habana==1.21.2", *ours]),
        Instruction("COPY", ". ."),
        Instruction("RUN", "pip install --no-cache-dir --no-deps --editable ."),
    ]
