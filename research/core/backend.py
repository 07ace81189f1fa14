"""Settings that must stand before JAX starts: the compilation cache, the compiler's flags, the
memory allocator.
"""

import ctypes
import glob
import importlib.util
import os
import pathlib
import sys

import psutil

from research.core.errors import UserError

# Options of the C library's `mallopt`, from its malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
# What a TPU or a GPU looks like from outside, and what makes a device on the bus a TPU: who made
# it.
ACCELERATORS = ("/dev/accel0", "/dev/vfio/0", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
VENDORS, GOOGLE = "/sys/bus/pci/devices/*/vendor", "0x1ae0"
# Bytes free, above which speed is worth memory.
AMPLE_MEMORY = 12e9
# Free pieces that lie ready for small allocations: how many, and the bytes of each.
SMALL_CHUNKS = (16, 2**25)


def cache_folder() -> pathlib.Path:
    """Returns where work is kept for reuse by any run: `$TESSERA_CACHE`, or `tessera` in the user's
    cache folder.
    """
    if "TESSERA_CACHE" in os.environ:
        return pathlib.Path(os.environ["TESSERA_CACHE"])
    if "XDG_CACHE_HOME" in os.environ:
        return pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "tessera"
    try:
        return pathlib.Path.home() / ".cache" / "tessera"
    except RuntimeError as error:
        raise UserError(
            "HOME is not set, so there is no folder for caches. Set TESSERA_CACHE to one."
        ) from error


def configure() -> None:
    """Sets the environment for JAX; what the user has set already stays. Call it before `jax` is
    imported.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    # Warnings of the runtime that no user can act on; errors stay.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not any(os.path.exists(device) for device in ACCELERATORS):
        keep_memory()
        if importlib.util.find_spec("libtpu") is not None and not tpu_on_bus():
            # It is here to compile for TPUs; asked for one, it would say in six lines that there is
            # none.
            os.environ.setdefault("JAX_PLATFORMS", "cpu")


def tpu_on_bus() -> bool:
    """Returns whether Linux sees a TPU."""
    return any(pathlib.Path(path).read_text().strip() == GOOGLE for path in glob.glob(VENDORS))


def keep_memory() -> None:
    """Makes the C library keep what is freed, so that every step finds its memory in place.

    XLA for CPU takes the temporaries of each step in one piece. By default such a piece goes back
    to the kernel after the step, and the next step waits for as many pages to be mapped and cleared
    again: up to half of its time. Only the main arena can be told otherwise, hence no others. The
    price is memory, several times what a step needs, so nothing happens where less than
    `AMPLE_MEMORY` is free, where the user has set `MALLOC_…` variables, or without glibc.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    if psutil.virtual_memory().available < AMPLE_MEMORY:
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
        libc.mallopt(option, value)
    # Without them small allocations are cut from the one large piece, which then is too small for
    # the next step, and a second large piece is taken. The few bytes after each, never freed, keep
    # them apart. Untouched, they cost nothing.
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    count, size = SMALL_CHUNKS
    pieces = [(libc.malloc(size), libc.malloc(1))[0] for _ in range(count)]
    for piece in pieces:
        libc.free(piece)
