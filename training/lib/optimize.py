"""Optimizers: Muon for matrices and convolution kernels, AdamW for all other parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from stages.internals.diffusers import QwenImageCausalConv3d
from training.lib.loop import Schedule


class _ImageKernel(nn.Module):
    """A causal kernel (out, in, t, h, w), of which only the last frame is trained, as a matrix (out, in * h * w)."""

    def __init__(self, shape: torch.Size, gain: float) -> None:
        super().__init__()
        self.shape = shape
        self.gain = gain

    def forward(self, matrix: torch.Tensor) -> torch.Tensor:
        frame = matrix.view(self.shape[0], self.shape[1], 1, *self.shape[3:])
        return F.pad(frame, (0, 0, 0, 0, self.shape[2] - 1, 0))

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight[:, :, -1].flatten(1) * self.gain


class _Kernel(nn.Module):
    """A kernel (out, in, h, w) trained as a matrix (out, in * h * w)."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.view(self.shape)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flatten(1)


def flatten_kernels(vae: nn.Module, fresh: bool) -> None:
    """Parametrise convolution kernels as matrices, which Muon can train; `restore_kernels` undoes it.

    Args:
        vae: an autoencoder, or a part of one.
        fresh: whether the kernels are newly initialised. As only the last frame of a kernel is trained, it is then
            scaled up to the variance of all frames.
    """
    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            shape = module.weight.shape
            kernel = _ImageKernel(shape, gain=shape[2] ** 0.5 if fresh else 1.0)
            parametrize.register_parametrization(module, "weight", kernel)
        elif isinstance(module, nn.Conv2d):
            parametrize.register_parametrization(module, "weight", _Kernel(module.weight.shape))


def restore_kernels(vae: nn.Module) -> None:
    """Turn the trained matrices back into ordinary weights."""
    for module in vae.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")


class StackedMuon(torch.optim.Optimizer):
    """`torch.optim.Muon` on all matrices of a shape at once, which saves thousands of kernel launches."""

    _COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    _ITERATIONS = 5
    _MOMENTUM = 0.95

    def __init__(self, matrices: Sequence[nn.Parameter], lr: float) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        super().__init__([{"params": alike} for alike in by_shape.values()], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            # Layers for videos of several frames have no gradients.
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            if not matrices:
                continue
            gradient = torch.stack([matrix.grad for matrix in matrices])
            state = self.state[matrices[0]]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            momentum = state["momentum"].lerp_(gradient, 1 - self._MOMENTUM)
            update = self._orthogonal(gradient.lerp(momentum, self._MOMENTUM))
            rows, columns = matrices[0].shape
            rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
            torch._foreach_add_(matrices, list(update.to(gradient.dtype).unbind()), alpha=-rate)

    def _orthogonal(self, matrices: torch.Tensor) -> torch.Tensor:
        """Orthogonalise matrices (count, rows, columns) by Newton-Schulz iterations: singular values become about 1."""
        a, b, c = self._COEFFICIENTS
        x = matrices.bfloat16()
        if tall := x.shape[1] > x.shape[2]:
            x = x.mT
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(self._ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x


def make_optimizers(model: nn.Module, schedule: Schedule, exclude: tuple[str, ...] = ()) -> list[torch.optim.Optimizer]:
    """Make Muon (Jordan 2024) for trainable matrices, and AdamW for all other trainable parameters.

    Args:
        model: the model.
        schedule: has AdamW's learning rate; Muon's updates are orthogonal matrices, for which 20 times that is usual.
        exclude: parts of the names of matrices that AdamW should train, such as embeddings and input and output layers.

    Returns:
        Muon and AdamW.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            chosen = parameter.ndim == 2 and not any(part in name for part in exclude)
            (matrices if chosen else others).append(parameter)
    muon = StackedMuon(matrices, lr=20 * schedule.learning_rate)
    adam = torch.optim.AdamW(others, lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [muon, adam]
