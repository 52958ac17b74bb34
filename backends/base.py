"""The interface of an accelerator to the engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

if TYPE_CHECKING:
    from torch import nn

M = TypeVar("M", bound="nn.Module")

# Of linear layers: eight bits for weights alone, or for weights and, scaled row by row at run time, activations.
Quantization = Literal["int8_weight_only", "int8_dynamic", "fp8_dynamic"]


class Backend(ABC):
    """What depends on the kind of device; independent of diffusion, it deals in modules.

    Attributes:
        name: name in configs.
        device: torch's name of the device that holds modules and their inputs.
        default_dtype: dtype of the weights if a model's config names none.
        quantizations: schemes that `quantize` supports.
    """

    name: ClassVar[str]
    device: ClassVar[str]
    default_dtype: ClassVar[Literal["float32", "bfloat16"]]
    quantizations: ClassVar[tuple[Quantization, ...]] = ()

    @property
    @abstractmethod
    def available(self) -> bool:
        """Whether this machine has such a device."""

    @abstractmethod
    def synchronise(self) -> None:
        """Wait until all work queued on the device is done, so that a clock read afterwards is right."""

    def place(self, module: M) -> M:
        """Move `module` to the device, for inference only."""
        return module.to(self.device).eval().requires_grad_(False)

    def check_quantization(self, scheme: Quantization) -> None:
        """Raise ValueError if the device does not support `scheme` or torchao is not installed."""
        if scheme not in self.quantizations:
            raise ValueError(f"must be one of {', '.join(self.quantizations)} on {self.name}, not {scheme!r}")
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
