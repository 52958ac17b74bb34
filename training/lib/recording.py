"""CUDA graphs of training steps, because a small model spends most of its time launching kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Tensors = tuple[torch.Tensor, ...]


class Recorded:
    """A function of tensors, recorded as a CUDA graph at the first call for each set of shapes, and then replayed.

    On a CPU the function is simply called. It must not synchronise with the device, and tensors that it reads or writes
    besides its arguments (weights, gradients) must keep their memory, see `hold_gradients`.
    """

    def __init__(self, function: Callable[..., Tensors]) -> None:
        self._function = function
        self._graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, Tensors, Tensors]] = {}

    def __call__(self, *inputs: torch.Tensor) -> Tensors:
        """Return the results for `inputs`, which the next call for the same shapes overwrites."""
        if not inputs[0].is_cuda:
            return self._function(*inputs)
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._graphs:
            self._graphs[shapes] = self._record(inputs)
        graph, held, outputs = self._graphs[shapes]
        for own, given in zip(held, inputs, strict=True):
            own.copy_(given)
        graph.replay()
        return outputs

    def _record(self, inputs: Tensors) -> tuple[torch.cuda.CUDAGraph, Tensors, Tensors]:
        held = tuple(tensor.detach().clone() for tensor in inputs)
        # A warm-up on another stream, as torch.cuda.graph asks, so that libraries allocate their workspaces before.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._function(*held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._function(*held)
        return graph, held, outputs


def hold_gradients(parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Allocate the gradients of `parameters`, set to zero; backward passes then add to them in place.

    A recorded function must itself reset them, by `torch._foreach_zero_`.
    """
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
