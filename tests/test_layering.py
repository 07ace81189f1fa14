"""The house keeps its floors: imports point down, and every config field is read."""

import ast
import pathlib

import pytest

import research
from tests.field_readers import Package

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
            faults.append(
                f"{path}: {here} (floor {FLOORS[here]}) imports {name} (floor {FLOORS[parts[1]]})"
            )
    return faults


def test_imports_point_down():
    faults = [
        fault for path in sources() for fault in layering_faults(path, ast.parse(path.read_text()))
    ]
    assert not faults, "\n".join(faults)


def test_an_upward_import_is_a_fault():
    tree = ast.parse("from research.training import loop")
    assert layering_faults(ROOT / "models" / "block.py", tree)


def test_data_does_not_import_jax():
    for path in sorted((ROOT / "data").rglob("*.py")):
        for name in imported_modules(ast.parse(path.read_text())):
            assert name.split(".")[0] not in ("jax", "flax", "optax"), f"{path} imports {name}"


def test_there_is_no_utils():
    assert not [
        path
        for path in sources()
        if "util" in path.stem or path.stem in ("common", "helpers", "misc")
    ]


def parsed() -> list[ast.Module]:
    return [ast.parse(path.read_text()) for path in sources()]


def test_every_config_field_is_read():
    package = Package(parsed())
    assert len(package.fields) > 20
    assert not package.unread()


def test_a_field_that_nothing_reads_is_found():
    # Names that are read as fields of other classes: what tells is the class that they are read
    # through.
    trees, dead = parsed(), {"kind", "head_dim", "path"}
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    (config,) = [node for node in classes if node.name == "TrainConfig"]
    checks = "def __post_init__(self):\n    assert self.kind"
    config.body += ast.parse("kind: str = ''\nhead_dim: int = 0\npath: str = ''\n" + checks).body
    assert Package(trees).unread() == {("TrainConfig", name) for name in dead}


@pytest.mark.parametrize(
    "reading",
    [
        "def f(c: Outer): return c.inner.size",
        "def f(c: 'Outer | None'): return [inner.size for inner in (c.inner, c.inner)]",
        "def f(outer: Outer):\n    c, other = outer.inner, 1\n    return lambda: c.size",
        "def f(all: list[Outer]):\n    for outer in all:\n        print(outer.chosen().size)",
        "class Layer:\n    config: Outer\n    def __call__(self): return self.config.inner.size",
        "class Layer:\n    def __init__(self, c: Inner): self.c = c\n    def f(self): return "
        "self.c.size",
        "def f(): return dataclasses.replace(Inner(), size=1).size",
    ],
)
def test_a_field_is_read_through_annotations(reading):
    classes = """
class InnerConfig:
    size: int
class OuterConfig:
    inner: InnerConfig
    def chosen(self) -> InnerConfig: return self.inner
"""
    written = reading.replace("Outer", "OuterConfig").replace("Inner", "InnerConfig")
    assert ("InnerConfig", "size") not in Package([ast.parse(classes + written)]).unread()
    elsewhere = written.replace("OuterConfig", "Other").replace("InnerConfig", "Other")
    assert ("InnerConfig", "size") in Package([ast.parse(classes + elsewhere)]).unread()


def decoders(tree: ast.AST) -> list[str]:
    """Calls that run a model with a cache."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    methods = [call for call in calls if isinstance(call.func, ast.Attribute)]
    return [
        call.func.attr
        for call in methods
        if call.func.attr == "mtp_step"
        or (
            call.func.attr in ("hidden", "apply")
            and "cache" in {word.arg for word in call.keywords}
        )
    ]


def test_one_module_runs_models_with_a_cache():
    rooms = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources()}
    found = {
        path.relative_to(ROOT).as_posix()
        for path, tree in rooms.items()
        if room(path) != "models" and decoders(tree)
    }
    assert found == {"inference/prefill.py"}
    assert decoders(ast.parse("model.hidden(params, inputs, cache=cache)"))  # the control
    assert not decoders(ast.parse("model.hidden(params, inputs)"))
