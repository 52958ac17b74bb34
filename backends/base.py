"""The interface of an accelerator to the engine."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from backends.buckets import Buckets

if TYPE_CHECKING:
    from torch import nn

M = TypeVar("M", bound="nn.Module")

_MOST_SHAPES = 2**16  # a bound above any that a warm-up meets

# Of linear layers: eight bits for weights alone, or for weights and, scaled row by row at run time, activations.
Quantization = Literal["int8_weight_only", "int8_dynamic", "fp8_dynamic"]


@dataclass(frozen=True)
class StaticShapes:
    """How to keep shapes few on a device that compiles for each of them.

    Attributes:
        batch: sizes of a batch.
        text: lengths of the texts in a batch, in tokens.
    """

    batch: Buckets = field(default=Buckets())
    text: Buckets = field(default=Buckets(64))


@dataclass(frozen=True)
class Memory:
    """A device's memory in bytes."""

    in_use: int
    free: int


class Backend(ABC):
    """What depends on the kind of device; independent of diffusion, it deals in modules.

    Attributes:
        name: name in configs.
        device: torch's name of the device that holds modules and their inputs.
        default_dtype: dtype of the weights if a model's config names none.
        quantizations: schemes that `quantize` supports.
        shapes: how to keep shapes few, or None where every shape runs at once.
        complex_numbers: whether the device multiplies complex numbers.
        attention: diffusers' attention backend that supports masks here, or None for the one that diffusers chooses.
        resources: Ray's resources that a replica asks for.
    """

    name: ClassVar[str]
    device: ClassVar[str]
    default_dtype: ClassVar[Literal["float32", "bfloat16"]]
    quantizations: ClassVar[tuple[Quantization, ...]] = ()
    shapes: ClassVar[StaticShapes | None] = None
    complex_numbers: ClassVar[bool] = True
    attention: ClassVar[str | None] = None
    resources: ClassVar[Mapping[str, float]] = MappingProxyType({})

    @property
    @abstractmethod
    def missing(self) -> str | None:
        """What this machine lacks to run on such a device, for people; None if it lacks nothing."""

    @abstractmethod
    def synchronise(self) -> None:
        """Wait until all work queued on the device is done, so that a clock read afterwards is right."""

    @abstractmethod
    def memory(self) -> Memory:
        """Measure the device's memory."""

    def give_way(self) -> None:
        """Let the host's other threads go before the calling one, which uses the device, where that is the host."""
        return

    def inference(self) -> AbstractContextManager[None]:
        """Switch gradients off in a `with` block."""
        import torch  # here, because checks of a configuration do without it

        return torch.inference_mode()

    def probe(self) -> None:
        """Compute on the device and wait for it; raises RuntimeError if the result is wrong or the device fails."""
        import torch  # here, because checks of a configuration do without it

        with self.inference():
            ones = torch.ones(8, 8).to(self.device)
            total = float((ones @ ones).sum().cpu())
        if total != 512.0:
            raise RuntimeError(f"{self.name} multiplied wrongly: the sum is {total}, not 512")

    def place(self, module: M) -> M:
        """Move `module` to the device, for inference only."""
        return module.to(self.device).eval().requires_grad_(False)

    def check_quantization(self, scheme: Quantization) -> None:
        """Raise ValueError if the device does not support `scheme` or torchao is not installed."""
        if scheme not in self.quantizations:
            supported = f"one of {', '.join(self.quantizations)}" if self.quantizations else "null"
            raise ValueError(f"must be {supported} on {self.name}, not {scheme!r}")
        if find_spec("torchao") is None:
            raise ValueError("needs torchao, which the extra `quantize` installs")

    def quantize(self, module: nn.Module, scheme: Quantization) -> None:
        """Quantize every linear layer in `module` with torchao, in place.

        Raises:
            ValueError: see `check_quantization`.
        """
        self.check_quantization(scheme)
        from torchao import quantization  # here, because its import takes seconds

        configs = {
            "int8_weight_only": quantization.Int8WeightOnlyConfig,
            "int8_dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
            "fp8_dynamic": quantization.Float8DynamicActivationFloat8WeightConfig,
        }
        quantization.quantize_(module, configs[scheme]())

    def compile(self, module: nn.Module) -> None:
        """Set up `module`, in place, to be compiled on its next call, for all shapes at once."""
        module.compile(fullgraph=True, dynamic=True)

    def keep_compilations(self, directory: Path) -> None:
        """Keep on disk what is compiled from here on, and find there what was; call it before anything is computed."""
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory)

    def end_graph(self) -> None:
        """End a graph between repeated parts, which then share one compilation, on a device that records operations."""
        return


def compile_each_shape(module: nn.Module, **options: Any) -> None:
    """Set up `module`, in place, to be compiled on each call with new shapes, however many there are.

    Args:
        module: the module.
        options: further options of `torch.compile`.
    """
    import torch._dynamo  # here, because checks of a configuration do without it

    # By default the ninth shape is an error.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = _MOST_SHAPES
    module.compile(fullgraph=True, dynamic=False, **options)


def host_memory() -> Memory:
    """Measure the machine's memory, for devices that share it."""
    page = os.sysconf("SC_PAGE_SIZE")
    free = page * os.sysconf("SC_AVPHYS_PAGES")
    return Memory(in_use=page * os.sysconf("SC_PHYS_PAGES") - free, free=free)
