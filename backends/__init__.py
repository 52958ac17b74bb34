"""One small class per kind of accelerator; nothing outside this package names a vendor.

Importing this package or its modules does not load torch, since configurations are checked without it.
"""

from backends.base import Backend, Quantization
from backends.cpu import CPUBackend
from backends.cuda import CUDABackend

_BACKENDS: dict[str, type[Backend]] = {backend.name: backend for backend in (CPUBackend, CUDABackend)}


def get_backend(name: str) -> Backend:
    """Return the backend called `name`; raises a ValueError that lists all names."""
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of {sorted(_BACKENDS)}, not {name!r}")
    return _BACKENDS[name]()


__all__ = ["Backend", "CPUBackend", "CUDABackend", "Quantization", "get_backend"]
