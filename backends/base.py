"""What the engine asks of an accelerator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class Backend(ABC):
    """Answers questions about a device; knows of diffusion only "a module and its inputs".

    Attributes:
        name: what configs call it.
        default_dtype: of the weights where a model's config names none.
    """

    name: ClassVar[str]
    default_dtype: ClassVar[torch.dtype]

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where modules and their inputs live."""

    @abstractmethod
    def synchronise(self) -> None:
        """Wait until everything queued on the device has run, so that a clock read afterwards is right."""

    def place(self, module: M) -> M:
        """Move `module` to the device, for inference alone."""
        return module.to(self.device).eval().requires_grad_(False)
