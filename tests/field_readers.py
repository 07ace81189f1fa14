"""Which fields of config classes are read, and through which class: types inferred from the
annotations of a package.

A value's type is the set of the package's classes that it may be, told from annotations (of
parameters, fields, attributes, results), constructors, assignments and loops. A container counts as
what it holds: iterating over a `tuple[LayerConfig, ...]`, or taking one of it, gives a
`LayerConfig`. What has no annotation has no type, and a field that is read through it is not read.
"""

import ast
import collections
import re
from collections.abc import Iterable

# These see every field of a config and use none.
_CHECKS = ("__post_init__", "to_dict", "to_json")
Types = frozenset[str]
_NOTHING: Types = frozenset()
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class Package:
    """The classes and functions of some sources, by their names.

    Args:
      trees: the parsed modules.
    """

    def __init__(self, trees: Iterable[ast.Module]):
        self._trees = list(trees)
        classes = [
            node
            for tree in self._trees
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
        ]
        self._names = {node.name for node in classes}
        self._bases = {
            node.name: [base.id for base in node.bases if isinstance(base, ast.Name)]
            for node in classes
        }
        # class -> attribute -> what it may be; functions stand under "".
        self._attributes: dict[str, dict[str, Types]] = collections.defaultdict(dict)
        self.fields: dict[str, set[str]] = collections.defaultdict(set)
        for tree in self._trees:
            self._declare("", tree.body)
        for node in classes:
            self._declare(node.name, node.body)
        for node in classes:
            self._declare_own_attributes(node)

    def _declare(self, owner: str, body: list[ast.stmt]) -> None:
        for item in body:
            if isinstance(item, _Function):
                self._add(owner, item.name, self._mentioned(item.returns))
            elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                self._add(owner, item.target.id, self._mentioned(item.annotation))
                if owner.endswith("Config"):
                    self.fields[owner].add(item.target.id)

    def _declare_own_attributes(self, node: ast.ClassDef) -> None:
        """Attributes that methods set, `self.config = config`."""
        for method in node.body:
            if isinstance(method, _Function):
                scope = _Scope(self, node.name, {})
                scope.parameters(method)
                for item in ast.walk(method):
                    if isinstance(item, ast.Assign):
                        for target, value in _pairs(item.targets[0], item.value):
                            if isinstance(target, ast.Attribute) and _is_self(target.value):
                                self._add(node.name, target.attr, scope.type_of(value))

    def _add(self, owner: str, name: str, types: Types) -> None:
        self._attributes[owner][name] = self._attributes[owner].get(name, _NOTHING) | types

    def _mentioned(self, annotation: ast.expr | None) -> Types:
        """The classes that an annotation names, `tuple[LayerConfig, ...] | None`."""
        if annotation is None:
            return _NOTHING
        found = set()
        for node in ast.walk(annotation):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"\w+", node.value))
            elif isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
        return frozenset(found & self._names)

    def attribute(self, types: Types, name: str) -> Types:
        """What an attribute, or the result of a method, of these classes may be."""
        found = _NOTHING
        for owner in self._with_bases(types):
            found |= self._attributes[owner].get(name, _NOTHING)
        return found

    def result(self, name: str) -> Types:
        """What calling a name gives: an object of a class, or a function's result."""
        return (
            frozenset({name}) if name in self._names else self._attributes[""].get(name, _NOTHING)
        )

    def owners(self, types: Types, name: str) -> set[str]:
        """The config classes among these that have the field."""
        return {owner for owner in self._with_bases(types) if name in self.fields.get(owner, ())}

    def _with_bases(self, types: Types) -> set[str]:
        found, left = set(), list(types)
        while left:
            name = left.pop()
            if name not in found:
                found.add(name)
                left += self._bases.get(name, [])
        return found

    def fields_read(self) -> set[tuple[str, str]]:
        """Pairs of a config class and a field that is read through a value of this class."""
        read: set[tuple[str, str]] = set()
        for tree in self._trees:
            _Scope(self, "", {}).read_block(tree.body, read)
        return read

    def unread(self) -> set[tuple[str, str]]:
        """Pairs of a config class and a field of it that nothing reads."""
        declared = {
            (owner, name)
            for owner, names in self.fields.items()
            for name in names
            if not self._is_new_default(owner, name)
        }
        return declared - self.fields_read()

    def _is_new_default(self, owner: str, name: str) -> bool:
        """Whether a class gives a field of its base a default: what reads the base reads it."""
        bases = self._with_bases(frozenset(self._bases[owner]))
        return any(name in self.fields.get(base, ()) for base in bases)


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _pairs(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    """The single assignments of `a, b = x, y`; where one value is unpacked, each target gets its
    type.
    """
    if not isinstance(target, ast.Tuple | ast.List):
        return [(target, value)]
    if isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts):
        return [
            pair
            for one, other in zip(target.elts, value.elts, strict=True)
            for pair in _pairs(one, other)
        ]
    return [pair for one in target.elts for pair in _pairs(one, value)]


class _Scope:
    """The names of one block and what they may be."""

    def __init__(self, package: Package, owner: str, names: dict[str, Types]):
        self._package, self._owner, self._names = package, owner, dict(names)

    def parameters(self, function: _Function | ast.Lambda) -> None:
        arguments = function.args
        for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            self._names[each.arg] = self._package._mentioned(each.annotation)
        if self._owner and arguments.args and arguments.args[0].arg in ("self", "cls"):
            self._names[arguments.args[0].arg] = frozenset({self._owner})

    def type_of(self, node: ast.expr | None) -> Types:
        """The classes that an expression may be of."""
        match node:
            case ast.Name():
                return self._names.get(
                    node.id, self._package._attributes[""].get(node.id, _NOTHING)
                )
            case ast.Attribute():
                return self._package.attribute(self.type_of(node.value), node.attr)
            case ast.Call(func=ast.Attribute(attr="replace"), args=[first, *_]):
                return self.type_of(first)
            case ast.Call(
                func=ast.Name(
                    id="zip" | "enumerate" | "reversed" | "sorted" | "list" | "tuple" | "set"
                )
            ):
                return self._union(node.args)
            case ast.Call(func=ast.Name(id=name)):
                return self._names.get(name, _NOTHING) or self._package.result(name)
            case ast.Call(func=ast.Attribute() as called):
                owner = self.type_of(called.value)
                return (
                    self._package.attribute(owner, called.attr)
                    or owner
                    or self._package.result(called.attr)
                )
            case ast.Subscript() | ast.Starred() | ast.Await():
                return self.type_of(node.value)
            case ast.IfExp():
                return self.type_of(node.body) | self.type_of(node.orelse)
            case ast.BoolOp():
                return self._union(node.values)
            case ast.NamedExpr():
                return self.type_of(node.value)
            case ast.Tuple() | ast.List() | ast.Set():
                return self._union(node.elts)
            case ast.Dict():
                return self._union(node.values)
            case ast.BinOp():
                return self._union([node.left, node.right])
            case ast.ListComp() | ast.GeneratorExp() | ast.SetComp():
                return self._inside(node).type_of(node.elt)
            case ast.DictComp():
                return self._inside(node).type_of(node.value)
        return _NOTHING

    def _union(self, nodes: Iterable[ast.expr]) -> Types:
        return frozenset().union(*(self.type_of(node) for node in nodes))

    def _inside(
        self, comprehension: ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp
    ) -> "_Scope":
        inner = _Scope(self._package, self._owner, self._names)
        for loop in comprehension.generators:
            inner._bind(loop.target, loop.iter)
        return inner

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        for one, other in _pairs(target, value):
            if isinstance(one, ast.Name):
                self._names[one.id] = self.type_of(other)

    def read_block(self, body: Iterable[ast.AST], read: set[tuple[str, str]]) -> None:
        """Goes through statements in order and adds the fields that they read."""
        for node in body:
            self._read(node, read)

    def _read(self, node: ast.AST, read: set[tuple[str, str]]) -> None:
        match node:
            case ast.ClassDef():
                _Scope(self._package, node.name, self._names).read_block(node.body, read)
                return
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                if getattr(node, "name", "") not in _CHECKS:
                    inner = _Scope(self._package, self._owner, self._names)
                    inner.parameters(node)
                    inner.read_block(ast.iter_child_nodes(node), read)
                return
            case ast.ListComp() | ast.GeneratorExp() | ast.SetComp() | ast.DictComp():
                self._inside(node).read_block(ast.iter_child_nodes(node), read)
                return
            case ast.Assign():
                self._bind(node.targets[0], node.value)
            case ast.AnnAssign(target=ast.Name(id=name)):
                self._names[name] = self._package._mentioned(node.annotation) or self.type_of(
                    node.value
                )
            case ast.NamedExpr() | ast.For():
                self._bind(node.target, node.iter if isinstance(node, ast.For) else node.value)
            case ast.withitem(optional_vars=ast.Name(id=name)):
                self._names[name] = self.type_of(node.context_expr)
            case ast.Attribute(ctx=ast.Load()):
                owners = self._package.owners(self.type_of(node.value), node.attr)
                read |= {(owner, node.attr) for owner in owners}
        self.read_block(ast.iter_child_nodes(node), read)
