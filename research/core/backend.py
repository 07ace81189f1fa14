"""Settings that must be made before JAX starts: the compilation cache, the compiler's flags, the
memory allocator.
"""

import ctypes
import glob
import importlib.util
import os
import pathlib
import re
import sys

import psutil

from research.core.errors import UserError

# Options of the C library's `mallopt`, from its malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
M_ARENA_MAX = -8
# Device files that exist where there is a TPU or a GPU.
ACCELERATORS = ("/dev/accel0", "/dev/vfio/0", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
# The vendor of each PCI device; Google's are TPUs.
VENDORS = "/sys/bus/pci/devices/*/vendor"
GOOGLE = "0x1ae0"
# Free bytes from which on memory is spent for speed.
AMPLE_MEMORY = 12e9
# Threads of each CPU device, where there are several.
THREADS_OF_DEVICE = 4
# Chunks that are allocated and freed in advance, for small allocations.
NUM_SMALL_CHUNKS = 16
SMALL_CHUNK_BYTES = 2**25


def cache_folder() -> pathlib.Path:
    """Returns the folder of what all runs may reuse: `$TESSERA_CACHE`, or `tessera` in the user's
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
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
    # Warnings of the runtime that no user can act on; errors stay.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    add_threads()
    if any(os.path.exists(device) for device in ACCELERATORS):
        return

    keep_memory()
    has_libtpu = importlib.util.find_spec("libtpu") is not None
    if has_libtpu and not tpu_on_bus():
        # libtpu is installed to compile for TPUs. Without a TPU, JAX would try to start it and log
        # six lines of errors.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def add_threads() -> None:
    """Gives XLA for CPU enough threads where it acts as several devices.

    A device waits for the others in a thread of a common pool, which has one for each device. But
    the order of collectives that do not depend on each other, one of them in a loop or a branch, is
    not fixed: where one device begins with the one and another with the other, the collectives that
    are begun need more threads than there are devices, and without them the process stands still.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    counts = re.findall(r"--xla_force_host_platform_device_count=(\d+)", flags)
    if counts and int(counts[-1]) > 1:
        # XLA takes the last of equal flags.
        threads = THREADS_OF_DEVICE * int(counts[-1])
        os.environ.setdefault("PJRT_NPROC", str(threads))


def tpu_on_bus() -> bool:
    """Returns whether Linux lists a TPU among the PCI devices."""
    files = [pathlib.Path(name) for name in glob.glob(VENDORS)]
    vendors = [file.read_text().strip() for file in files]
    return GOOGLE in vendors


def keep_memory() -> None:
    """Makes the C library keep freed memory mapped, so that the next step can reuse it.

    XLA for CPU allocates the temporaries of each step as one chunk. By default glibc returns such a
    chunk to the kernel after the step, and the next step waits while the same number of pages is
    mapped and cleared again: up to half of its time. The setting applies to the main arena only, so
    there is no other. It costs memory, several times what a step needs, so nothing happens where
    less than `AMPLE_MEMORY` is free, where the user has set `MALLOC_…` variables, or without glibc.
    """
    user_has_set = any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or user_has_set:
        return
    if psutil.virtual_memory().available < AMPLE_MEMORY:
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return

    # One arena, no separate mappings for large chunks, and nothing returned to the kernel.
    libc.mallopt(M_ARENA_MAX, 1)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    _free_small_chunks(libc)


def _free_small_chunks(libc: ctypes.CDLL) -> None:
    """Pre-allocates free chunks, so that small allocations do not split XLA's chunk, which would
    then be too small for the next step. Pages that nobody writes to take no memory.
    """
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.restype = None
    libc.free.argtypes = [ctypes.c_void_p]

    chunks = []
    for _ in range(NUM_SMALL_CHUNKS):
        chunks.append(libc.malloc(SMALL_CHUNK_BYTES))
        # A few bytes that are never freed, or glibc would merge neighbouring free chunks.
        libc.malloc(1)
    for chunk in chunks:
        libc.free(chunk)
