"""The code keeps its budgets: lengths and density of functions, one statement a thought, its words.

What they are for, and what other codebases have, stands in CONTRIBUTING.md.
"""

import ast
import io
import pathlib
import re
import tokenize
from collections.abc import Callable, Iterator

import pytest

import research

ROOT = pathlib.Path(research.__file__).parent
HOUSE = ROOT.parent
FILE_LINES, RECIPE_LINES = 400, 150
FUNCTION_LINES, FUNCTION_STATEMENTS, FUNCTION_NODES = 60, 40, 400
# Of all functions together: AST nodes per line of code, and the share of lines that are comments.
MOST_NODES_A_LINE, LEAST_COMMENTS = 7.0, 0.04

# What is over a budget, and why it may be: "path" or "path:function".
EXCEPTIONS: dict[str, str] = {}
# Words that one room used for what the field has another word for.
RETIRED = {
    r"\bbod(y|ies) of (attention|an operation)": "implementation",
    r"\brefusals?\b": "unsupported_reason",
    r"\babsorbed\b": "MLA weight absorption",
    r"\bwoven\b": "interleaved",
    r"\bshare(d|s)? out\b": "shard",
    r"\bonce_a_device\b": "shard_map",
    r"\bSettling\b|\bBehind\b": "background writer, background worker",
    r"\b[Ee]lder\b": "older",
    r"\b[Gg]oes on from\b": "resuming from",
    r"\bowed\b": "pending",
    r"\btelling load\b|\bsteering\b": "expert load, selection-bias update",
    r"\bread_prompts\b|\btext_before\b": "prefill, prompt_ids",
    r"\b[Ww]ho sees whom\b": "attention mask",
    r"\btaken? apart\b|\banatomy\b": "parameter summary",
    r"\btake_apart\b": "parameter_tree",
    r"\{future\}|\bFUTURE\b|\bfurther token is predicted\b": "multi-token prediction, mtp",
    r"\b_STRETCH\b|\bunstretched\b": "RoPE scaling",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> list[pathlib.Path]:
    return sorted(ROOT.rglob("*.py"))


def prose() -> list[pathlib.Path]:
    """Returns what people read beside the code; old figures keep the words of their time."""
    pages = [*HOUSE.glob("*.md"), *(HOUSE / "docs").glob("*.md")]
    scripts = [*(HOUSE / "launch").rglob("*.sh"), *(HOUSE / "configs").rglob("*.py")]
    tests = set((HOUSE / "tests").rglob("*.py")) - {pathlib.Path(__file__)}
    dated = {page for page in pages if re.search(r"-\d{4}-\d\d-\d\d$", page.stem)}
    return sorted({*pages, *scripts, *tests} - dated)


def room(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def node_count(tree: ast.AST) -> int:
    return sum(not isinstance(node, ast.expr_context) for node in ast.walk(tree))


def budget_faults(name: str, text: str, file_lines: int) -> Iterator[tuple[str, str]]:
    """Yields what is over its budget, as a key of EXCEPTIONS, with the fault."""
    lines = text.count("\n")
    if lines > file_lines:
        yield name, f"{lines} lines, over {file_lines}"
    for function in functions(ast.parse(text)):
        counts = {
            "lines": (function.end_lineno - function.lineno + 1, FUNCTION_LINES),
            "statements": (
                sum(isinstance(node, ast.stmt) for node in ast.walk(function)),
                FUNCTION_STATEMENTS,
            ),
            "AST nodes": (node_count(function), FUNCTION_NODES),
        }
        for unit, (count, most) in counts.items():
            if count > most:
                yield f"{name}:{function.name}", f"{count} {unit}, over {most}"


def test_files_and_functions_keep_their_budgets():
    faults, used = [], set()
    for path in sources():
        limit = RECIPE_LINES if room(path) == "recipes" else FILE_LINES
        for key, fault in budget_faults(str(path.relative_to(ROOT)), path.read_text(), limit):
            used.add(key)
            if key not in EXCEPTIONS:
                faults.append(f"{key}: {fault}")
    assert not faults, "\n".join(faults)
    assert used == EXCEPTIONS.keys(), "an exception that nothing needs"


def test_files_of_tests_keep_the_budget_of_a_file():
    lengths = {
        str(path.relative_to(HOUSE)): len(path.read_text().splitlines())
        for path in (HOUSE / "tests").rglob("*.py")
    }
    assert not {name: length for name, length in lengths.items() if length > FILE_LINES}


def test_a_function_over_its_budget_is_a_fault():
    short = "def f(x):\n    return x\n"
    assert not list(budget_faults("a.py", short, FILE_LINES))
    dense = f"def f(x):\n    return {'+'.join('x' * FUNCTION_NODES)}\n"
    assert [key for key, _ in budget_faults("a.py", dense, FILE_LINES)] == ["a.py:f"]
    assert [key for key, _ in budget_faults("a.py", short, 1)] == ["a.py"]


def parallel_assignments(tree: ast.AST) -> Iterator[int]:
    """Yields the lines of `a, b = f(x), g(y)`; a swap, whose names are the same, is none."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        for target in node.targets:
            if isinstance(target, ast.Tuple | ast.List):
                names = sorted(ast.unparse(name) for name in target.elts)
                if names != sorted(ast.unparse(value) for value in node.value.elts):
                    yield node.lineno


def conditional_arguments(tree: ast.AST) -> Iterator[int]:
    """Yields the lines of `f(a if b else c)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            yield from (value.lineno for value in arguments if isinstance(value, ast.IfExp))


def crowded_comprehensions(tree: ast.AST) -> Iterator[int]:
    """Yields the lines of comprehensions with two conditions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.comprehension):
            conditions = [*node.ifs]
            if conditions and isinstance(conditions[0], ast.BoolOp):
                conditions = conditions[0].values
            if len(conditions) > 1:
                yield node.target.lineno


RULES = {
    parallel_assignments: (
        "def f(x):\n    a, b = g(x), h(x)\n",
        "def f(x):\n    a, b = g(x)\n    a, b = b, a\n",
    ),
    conditional_arguments: ("g(1 if x else 2)\n", "y = 1 if x else 2\ng(y)\n"),
    crowded_comprehensions: ("[y for y in x if y and z]\n", "[y for y in x if y]\n"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_statement_holds_one_thought(rule: Callable[[ast.AST], Iterator[int]]):
    faults = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources()
        for line in rule(ast.parse(path.read_text()))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_statement_with_two_thoughts_is_a_fault(rule: Callable[[ast.AST], Iterator[int]]):
    bad, good = RULES[rule]
    assert list(rule(ast.parse(bad)))
    assert not list(rule(ast.parse(good)))


def density(texts: list[str]) -> tuple[float, float]:
    """Returns AST nodes per line of code, and the share of comment lines, inside functions."""
    nodes = code = comments = lines = 0
    for text in texts:
        rows = text.splitlines()
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comment_rows = {
            token.start[0]
            for token in tokens
            if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
        }
        for function in functions(ast.parse(text)):
            documented = ast.get_docstring(function) is not None
            body = function.body[1:] if documented else function.body
            if not body:
                continue
            inside = range(body[0].lineno, function.end_lineno + 1)
            commented = sum(row in comment_rows for row in inside)
            nodes += sum(map(node_count, body))
            code += sum(bool(rows[row - 1].strip()) for row in inside) - commented
            comments += commented
            lines += len(inside)
    return nodes / code, comments / lines


def test_the_code_is_no_denser_than_the_field_writes():
    nodes, comments = density([path.read_text() for path in sources()])
    assert nodes <= MOST_NODES_A_LINE
    assert comments >= LEAST_COMMENTS


def test_density_counts_nodes_and_comments():
    # Return, BinOp, Name, Add, Constant on one line of code; one comment in two lines.
    assert density(["def f(x):\n    # why\n    return x + 1\n"]) == (5.0, 0.0)
    # A comment above the first statement lies outside of its body.
    text = 'def f(x):\n    """Doc."""\n    y = x\n    # why\n    return y\n'
    assert density([text]) == (5 / 2, 1 / 3)


def test_retired_words_stay_away():
    faults = []
    for path in [*sources(), *prose()]:
        for pattern, word in RETIRED.items():
            for match in re.finditer(pattern, path.read_text()):
                faults.append(f"{path.relative_to(HOUSE)}: {match[0]!r}; write {word}")
    assert not faults, "\n".join(faults)
