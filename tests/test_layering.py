"""The house keeps its floors: imports point down, files and functions keep their budgets, every field is read."""

import ast
import dataclasses
import importlib
import pathlib
import pkgutil

import research

ROOT = pathlib.Path(research.__file__).parent
FLOORS = {
    "core": 0,
    **dict.fromkeys(("storage", "parallel"), 1),
    **dict.fromkeys(("data", "kernels"), 2),
    **dict.fromkeys(("models", "losses", "optim"), 3),
    **dict.fromkeys(("interop", "peft", "quant"), 4),
    **dict.fromkeys(("training", "inference"), 5),
    **dict.fromkeys(("alignment", "evaluation", "forgetting", "scaling"), 6),
    **dict.fromkeys(("inspection", "bench"), 7),
    "recipes": 8,
    # `api` and `cli` are two front doors of the recipes, so both stand above them.
    **dict.fromkeys(("api", "cli"), 9),
    "__main__": 10,
    "__init__": 10,
}
FILE_LINES, FUNCTION_LINES, RECIPE_LINES = 400, 60, 150
# name -> why it may be longer
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}


def sources() -> list[pathlib.Path]:
    return sorted(ROOT.rglob("*.py"))


def room(path: pathlib.Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported_modules(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def layering_faults(path: pathlib.Path, tree: ast.AST) -> list[str]:
    faults = []
    here = room(path)
    for name in imported_modules(tree):
        parts = name.split(".")
        if parts[0] in ("configs", "launch", "tests"):
            faults.append(f"{path} imports {name}")
        if parts[0] != "research" or len(parts) < 2 or parts[1] == here:
            continue
        if FLOORS[parts[1]] >= FLOORS[here]:
            faults.append(f"{path}: {here} (floor {FLOORS[here]}) imports {name} (floor {FLOORS[parts[1]]})")
    return faults


def test_imports_point_down():
    faults = [fault for path in sources() for fault in layering_faults(path, ast.parse(path.read_text()))]
    assert not faults, "\n".join(faults)


def test_an_upward_import_is_a_fault():
    tree = ast.parse("from research.training import loop")
    assert layering_faults(ROOT / "models" / "block.py", tree)


def test_data_does_not_import_jax():
    for path in sorted((ROOT / "data").rglob("*.py")):
        for name in imported_modules(ast.parse(path.read_text())):
            assert name.split(".")[0] not in ("jax", "flax", "optax"), f"{path} imports {name}"


def test_files_and_functions_keep_their_budgets():
    faults = []
    for path in sources():
        text = path.read_text()
        name = str(path.relative_to(ROOT))
        limit = RECIPE_LINES if room(path) == "recipes" else FILE_LINES
        if text.count("\n") > limit and name not in LONG_FILES:
            faults.append(f"{name}: {text.count(chr(10))} lines, over {limit}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES and f"{name}:{node.name}" not in LONG_FUNCTIONS:
                    faults.append(f"{name}: {node.name} has {lines} lines, over {FUNCTION_LINES}")
    assert not faults, "\n".join(faults)


def test_there_is_no_utils():
    assert not [path for path in sources() if "util" in path.stem or path.stem in ("common", "helpers", "misc")]


def config_fields() -> dict[str, set[str]]:
    """Fields of every dataclass named *Config, by field name, with the names of the classes that own them."""
    owners: dict[str, set[str]] = {}
    for module in pkgutil.walk_packages(research.__path__, "research."):
        if module.name.endswith("__main__"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.endswith("Config") and dataclasses.is_dataclass(value):
                for field in dataclasses.fields(value):
                    owners.setdefault(field.name, set()).add(name)
    return owners


def fields_read() -> set[str]:
    """Names read as attributes anywhere but in a `__post_init__`, which validates and does not use."""
    read = set()
    for path in sources():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                node.body = [item for item in node.body if getattr(item, "name", "") != "__post_init__"]
        read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return read


def test_every_config_field_is_read():
    owners, read = config_fields(), fields_read()
    unread = {name: sorted(classes) for name, classes in owners.items() if name not in read}
    assert not unread, unread
