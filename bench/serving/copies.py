"""Count what a process copies within its memory, by putting a counter in front of libc's memcpy and memmove.

The counter is a library of a few lines that the machine's C compiler makes, and that LD_PRELOAD loads into a process.
It sees every copy that extension modules and Python itself make by these functions; it does not see what the kernel
copies to and from sockets, and what vectorised loops of torch copy. Copies below `SMALLEST` bytes are left out.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

SMALLEST = 16 * 1024

_SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stddef.h>

typedef void *copy(void *, const void *, size_t);
static _Atomic size_t copied;

size_t copied_bytes(void) { return atomic_load(&copied); }

static void *count(const char *name, copy **function, void *to, const void *from, size_t size) {
    if (size >= SMALLEST) atomic_fetch_add(&copied, size);
    if (!*function) {
        copy *found = (copy *) dlsym(RTLD_NEXT, name);
        *function = found;
    }
    return (*function)(to, from, size);
}

void *memcpy(void *to, const void *from, size_t size) {
    static copy *function;
    return count("memcpy", &function, to, from, size);
}

void *memmove(void *to, const void *from, size_t size) {
    static copy *function;
    return count("memmove", &function, to, from, size);
}
"""


def build_counter(directory: Path) -> Path | None:
    """Compile the counter in `directory`; return the library's path, or None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    source, library = directory / "copies.c", directory / "copies.so"
    source.write_text(_SOURCE)
    options = ("-O1", "-fno-builtin", "-shared", "-fPIC", f"-DSMALLEST={SMALLEST}")
    subprocess.run([compiler, *options, "-o", str(library), str(source), "-ldl"], check=True, timeout=120)
    return library


def copied_bytes() -> int | None:
    """Return how many bytes this process has copied, or None if the counter is not loaded."""
    try:
        function = ctypes.CDLL(None).copied_bytes
    except AttributeError:
        return None
    function.restype = ctypes.c_size_t
    return int(function())
