"""One small class per kind of accelerator; nothing else that runs a model names a vendor.

Importing this package or its modules does not load torch, since configurations are checked without it.
"""

from backends.base import Backend, Memory, Quantization, StaticShapes
from backends.cpu import CPUBackend
from backends.cuda import CUDABackend
from backends.gaudi import GaudiBackend
from backends.rocm import ROCmBackend
from backends.tpu import TPUBackend
from backends.xla import XLABackend

_BACKENDS: dict[str, type[Backend]] = {
    backend.name: backend for backend in (CPUBackend, CUDABackend, GaudiBackend, ROCmBackend, TPUBackend, XLABackend)
}


def get_backend(name: str) -> Backend:
    """Return the backend called `name`; raises a ValueError that lists all names."""
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of {sorted(_BACKENDS)}, not {name!r}")
    return _BACKENDS[name]()


def backend_names() -> tuple[str, ...]:
    """Return the names of all backends."""
    return tuple(_BACKENDS)


__all__ = [
    "Backend", "CPUBackend", "CUDABackend", "GaudiBackend", "Memory", "Quantization", "ROCmBackend", "StaticShapes",
    "TPUBackend", "XLABackend", "backend_names", "get_backend",
]  # fmt: skip
