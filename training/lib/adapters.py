"""LoRAs under training: adding, activating and saving them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from training.lib.recording import hold_gradients

# Every linear layer of Qwen-Image's blocks, modulation included.
TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "net.0.proj", "net.2", "img_mod.1", "txt_mod.1",
]  # fmt: skip


class Lora:
    """A LoRA under training, or several that share an optimizer.

    The gradients keep their memory, so that backward passes can be recorded; see `training.lib.recording`.
    """

    def __init__(self, name: str, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Take parameters that are on a transformer.

        Args:
            name: name of the adapter.
            parameters: its parameters.
            optimizer: optimizer of these parameters.
        """
        self.name = name
        self._parameters = list(parameters)
        self._optimizer = optimizer
        self._gradients = hold_gradients(self._parameters)

    def backward(self, accelerator: Accelerator, loss: torch.Tensor) -> None:
        """Set the gradients to those of `loss`."""
        torch._foreach_zero_(self._gradients)
        for parameter in self._parameters:
            # peft clears this when another LoRA becomes active, and backward passes skip parameters without it.
            parameter.requires_grad_(True)
        accelerator.backward(loss)

    def step(self) -> None:
        """Take an optimizer step, with gradients clipped to a norm of 1."""
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()


def add_lora(
    transformer: QwenImageTransformer2DModel, name: str, rank: int, start_from: str | None = None
) -> list[torch.nn.Parameter]:
    """Add a LoRA to a transformer.

    Args:
        transformer: the transformer.
        name: name of the adapter.
        rank: rank of a new LoRA.
        start_from: directory or repo id of a saved LoRA to load, or None for a new one, which changes nothing yet.

    Returns:
        The LoRA's parameters, in float32.
    """
    if start_from is None:
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), adapter_name=name)
    else:
        transformer.load_lora_adapter(QwenImagePipeline.lora_state_dict(start_from), adapter_name=name)
    parameters = lora_parameters(transformer, name)
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def lora_parameters(transformer: QwenImageTransformer2DModel, name: str) -> list[torch.nn.Parameter]:
    """Return the parameters of LoRA `name`, which the transformer already has."""
    return [parameter for key, parameter in transformer.named_parameters() if f".{name}." in key]


@contextmanager
def active(transformer: QwenImageTransformer2DModel, name: str | None) -> Iterator[None]:
    """Activate LoRA `name`, or none; only the active LoRA gets gradients. It stays active after the `with` block."""
    if name is None:
        transformer.disable_lora()
    else:
        transformer.enable_lora()
        transformer.set_adapter(name)
    yield


def save_lora(transformer: QwenImageTransformer2DModel, name: str, directory: Path, dtype: torch.dtype) -> None:
    """Write LoRA `name` in the format of diffusers' `load_lora_weights`."""
    state = get_peft_model_state_dict(transformer, adapter_name=name)
    state = {key: value.to(dtype).contiguous() for key, value in state.items()}
    QwenImagePipeline.save_lora_weights(directory, transformer_lora_layers=state)
