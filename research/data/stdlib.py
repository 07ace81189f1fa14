"""The embedded corpus: text that every Python carries, so that the quickstart downloads nothing.

Three kinds of document: the language reference (`pydoc_data`), the source files of the standard
library, and the docstrings of each such file as prose. A file and its docstrings share one key, so
they are in the same split. No module is imported: the files are read and parsed.
"""

import ast
import hashlib
import pathlib
import sysconfig
import tokenize
from collections.abc import Callable, Iterator

# Top-level folders left out: third-party code, the test suite (as large as the library itself, and
# not always installed), compiled extensions, and codecs, which are near-copies of one another: some
# would be held out while their copies are trained on.
LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "lib-dynload", "encodings", "__pycache__"}
)
TOPICS = "pydoc_data/topics.py"
MIN_DOCSTRING = 40
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def files() -> dict[str, pathlib.Path]:
    """Returns the corpus files by name, as `asyncio/events.py`."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = []
    for top in root.iterdir():
        if _is_left_out(top.name):
            continue
        if top.is_dir():
            found += top.rglob("*.py")
        elif top.suffix == ".py":
            found.append(top)

    named = {path.relative_to(root).as_posix(): path for path in found}
    # Test data may be invalid Python on purpose.
    return {name: path for name, path in sorted(named.items()) if "/tests/data/" not in name}


def _is_left_out(top: str) -> bool:
    # Build settings hold the paths of the machine that compiled Python.
    return top in LEFT_OUT or top.startswith(("config-", "_sysconfigdata"))


def texts(skip: Callable[[str, str], None]) -> Iterator[tuple[str, str, str]]:
    """Yields (name, split key, text) of every document, ordered by a hash of the file's name.

    Args:
      skip: called with (file, reason) for a file that cannot be read.
    """
    seen: set[str] = set()
    paths = files()
    for name in sorted(paths, key=lambda name: hashlib.blake2b(name.encode()).digest()):
        path = paths[name]
        try:
            with tokenize.open(path) as file:
                text = file.read()
            tree = ast.parse(text)
        except (OSError, SyntaxError, ValueError, RecursionError) as error:
            skip(str(path), f"not a Python file ({error})")
            continue
        if not text or text in seen:
            continue
        seen.add(text)

        if name == TOPICS:
            yield from _topics(tree)
            continue
        yield name, name, text
        prose = _docstrings(tree)
        if prose:
            yield f"docstrings/{name}", name, prose


def _topics(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Yields the chapters of the language reference, which are one literal dict in the module."""
    literal = next(node for node in ast.walk(tree) if isinstance(node, ast.Dict))
    for topic, text in ast.literal_eval(literal).items():
        name = f"reference/{topic}"
        yield name, name, text


def _docstrings(tree: ast.Module) -> str:
    """Returns the docstrings of a module, its classes and functions, in source order, each under
    its name.
    """
    parts = []
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, DOCUMENTED):
            doc = ast.get_docstring(node) or ""
            if len(doc) >= MIN_DOCSTRING:
                heading = "" if isinstance(node, ast.Module) else f"{node.name}\n\n"
                parts.append(heading + doc)

        # Expressions, most of the tree, hold no definitions. Reversed, since a stack pops its last
        # item.
        children = list(ast.iter_child_nodes(node))
        for child in reversed(children):
            if isinstance(child, ast.stmt | ast.excepthandler):
                stack.append(child)
    return "\n\n\n".join(parts)
