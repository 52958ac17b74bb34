"""Work that is launched once and replayed: a small model keeps a fast accelerator waiting for its own launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Tensors = tuple[torch.Tensor, ...]


class Recorded:
    """A function of tensors, recorded at its first call for each set of shapes and replayed from then on.

    On a CPU it is simply called. The function must not wait for the device, and what it keeps elsewhere (gradients,
    weights) must stay where it is: see `hold_gradients`.
    """

    def __init__(self, function: Callable[..., Tensors]) -> None:
        self._function = function
        self._graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, Tensors, Tensors]] = {}

    def __call__(self, *inputs: torch.Tensor) -> Tensors:
        """Results for `inputs`; they are overwritten by the next call for the same shapes."""
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
        # Warm-up on a stream of its own, so that libraries allocate their workspaces before the recording.
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
    """Gradients of `parameters`, all zero, that stay where they are: backward passes add to them.

    A recorded function sets them to zero itself, by `torch._foreach_zero_`.
    """
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
