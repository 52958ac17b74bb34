"""What the engine asks of an accelerator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

if TYPE_CHECKING:
    from torch import nn

M = TypeVar("M", bound="nn.Module")

# Of the linear layers: weights in eight bits, or weights and, row by row as they come, activations.
Quantization = Literal["int8_weight_only", "int8_dynamic", "fp8_dynamic"]


class Backend(ABC):
    """Answers questions about a device; knows of diffusion only "a module and its inputs".

    Attributes:
        name: what configs call it.
        device: where modules and their inputs live, by torch's name.
        default_dtype: of the weights where a model's config names none.
        quantizations: what `quantize` takes.
    """

    name: ClassVar[str]
    device: ClassVar[str]
    default_dtype: ClassVar[Literal["float32", "bfloat16"]]
    quantizations: ClassVar[tuple[Quantization, ...]] = ()

    @abstractmethod
    def synchronise(self) -> None:
        """Wait until everything queued on the device has run, so that a clock read afterwards is right."""

    def place(self, module: M) -> M:
        """Move `module` to the device, for inference alone."""
        return module.to(self.device).eval().requires_grad_(False)

    def check_quantization(self, scheme: Quantization) -> None:
        """Raises ValueError if this device has no such arithmetic, or torchao is not installed."""
        if scheme not in self.quantizations:
            raise ValueError(f"must be one of {', '.join(self.quantizations)} on {self.name}, not {scheme!r}")
        if find_spec("torchao") is None:
            raise ValueError("needs torchao, which the extra `quantize` installs")

    def quantize(self, module: nn.Module, scheme: Quantization) -> None:
        """Quantize every linear layer in `module`, in place, by torchao.

        Raises:
            ValueError: see `check_quantization`.
        """
        self.check_quantization(scheme)
        from torchao import quantization  # takes seconds to import, which only those who use it should wait for

        configs = {
            "int8_weight_only": quantization.Int8WeightOnlyConfig,
            "int8_dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
            "fp8_dynamic": quantization.Float8DynamicActivationFloat8WeightConfig,
        }
        quantization.quantize_(module, configs[scheme]())

    def compile(self, module: nn.Module) -> None:
        """Compile `module` on its next call, in place and for all shapes at once."""
        module.compile(fullgraph=True, dynamic=True)
