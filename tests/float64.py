"""Tessera in float64: a process in which every `float32` of its source is read as `float64`.

Two programs that compute the same agree to some 1e-14 there, so that what differs in float32 is
seen to be rounding, or a fault.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType

import jax

ROOT = pathlib.Path(__file__).parents[1]


class _Loader(importlib.abc.SourceLoader):
    """Compiles a file with its float type changed, and leaves no bytecode behind."""

    def __init__(self, path: str) -> None:
        self.path = path

    def get_filename(self, fullname: str) -> str:
        return self.path

    def get_data(self, path: str) -> bytes:
        return pathlib.Path(path).read_bytes()

    def source_to_code(self, data: bytes, path: str) -> CodeType:
        # Names of functions change too, where they are made and where they are called.
        in_float64 = data.replace(b"float32", b"float64")
        return compile(in_float64, path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds this project's modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        found = importlib.machinery.PathFinder.find_spec(fullname, path)
        if found is None or found.origin is None:
            return None
        if not pathlib.Path(found.origin).is_relative_to(ROOT / fullname.split(".")[0]):
            return None
        return importlib.util.spec_from_file_location(
            fullname,
            found.origin,
            loader=_Loader(found.origin),
            submodule_search_locations=found.submodule_search_locations,
        )


def use_float64() -> None:
    """Makes modules that are imported from here on compute in float64."""
    jax.config.update("jax_enable_x64", True)
    sys.meta_path.insert(0, _Finder())
