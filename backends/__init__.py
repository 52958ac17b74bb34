"""One small class per kind of accelerator; nothing outside this package names a vendor.

Neither this package nor its modules load torch by being imported: configurations are checked without it.
"""

from backends.base import Backend, Quantization
from backends.cpu import CPUBackend
from backends.cuda import CUDABackend

_BACKENDS: dict[str, type[Backend]] = {backend.name: backend for backend in (CPUBackend, CUDABackend)}


def get_backend(name: str) -> Backend:
    """Return the backend called `name`; raises ValueError that lists those there are."""
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of {sorted(_BACKENDS)}, not {name!r}")
    return _BACKENDS[name]()


__all__ = ["Backend", "CPUBackend", "CUDABackend", "Quantization", "get_backend"]
