"""Mutants: a module with one small fault in a function, and how a running process takes it up.

Faults are made in the bodies of functions: an operator, a comparison's bound, a branch, a number, a
keyword, the order of two arguments, a statement that is left out.  Texts, default values and tables
of a module stay as they are.
"""

import ast
import copy
import dataclasses
import gc
import inspect
import os
import pathlib
import types
from collections.abc import Iterator

OTHER_OPERATOR = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OTHER_CALL = {
    "min": "max",
    "max": "min",
    "amin": "amax",
    "amax": "amin",
    "minimum": "maximum",
    "maximum": "minimum",
    "any": "all",
    "all": "any",
    "sum": "mean",
    "mean": "sum",
    "log1p": "log",
    "expm1": "exp",
    "ones": "zeros",
    "zeros": "ones",
    "floor": "ceil",
    "ceil": "floor",
}
SYMMETRIC = {"min", "max", "minimum", "maximum", "logaddexp"}  # in their two arguments
OTHER_CALL |= {f"{name}_": f"{other}_" for name, other in OTHER_CALL.items()}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One fault: the node of the module's tree (counted by ``ast.walk``) and what replaces it."""

    path: str
    line: int
    column: int
    source: str  # the line
    before: str
    after: str
    node: int
    replacement: ast.AST

    @property
    def lasting_name(self) -> str:
        """A name that other changes of the file leave as it is."""
        return f"{self.path}: {self.before} -> {self.after}, in: {self.source}"

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column}: {self.before} -> {self.after}"


def _edited(node: ast.AST, **fields: object) -> ast.AST:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in a node's place."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        if other := OTHER_OPERATOR.get(type(node.op)):
            yield _edited(node, op=other())
    elif isinstance(node, ast.Compare):
        if other := OTHER_OPERATOR.get(type(node.ops[0])):
            yield _edited(node, ops=[other(), *node.ops[1:]])
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield _edited(node, value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield _edited(node, value=node.value + 1)
    elif isinstance(node, ast.Call):
        yield from _other_calls(node)
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        if not isinstance(node, ast.While):
            yield _edited(node, test=ast.copy_location(ast.Constant(True), node.test))
        yield _edited(node, test=ast.copy_location(ast.Constant(False), node.test))
    left_out = isinstance(node, ast.AugAssign | ast.Continue | ast.Break) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    )
    if left_out:
        yield ast.copy_location(ast.Pass(), node)


def _other_calls(node: ast.Call) -> Iterator[ast.Call]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if other := OTHER_CALL.get(name):
        field = "attr" if isinstance(node.func, ast.Attribute) else "id"
        yield _edited(node, func=_edited(node.func, **{field: other}))
    plain = not any(isinstance(argument, ast.Starred) for argument in node.args)
    if plain and len(node.args) >= 2 and name not in {*SYMMETRIC, "fail", "isinstance"}:
        first, second, *others = node.args
        if ast.dump(first) != ast.dump(second):
            yield _edited(node, args=[second, first, *others])
    for n, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            yield _edited(node, keywords=node.keywords[:n] + node.keywords[n + 1 :])


def mutants_of(root: pathlib.Path, path: str) -> list[Mutant]:
    """Return all mutants of a file, in the order of its tree."""
    text = (root / path).read_text()
    tree, lines = ast.parse(text), [line.strip() for line in text.splitlines()]
    run = set()  # the nodes in functions' bodies
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.Lambda):
            body = function.body if isinstance(function.body, list) else [function.body]
            run.update(node for statement in body for node in ast.walk(statement))
    # A message is not what the code does, and an annotation is not run.
    unread = set()
    for node in ast.walk(tree):
        inside = [node.annotation] if isinstance(node, ast.AnnAssign) else []
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "fail":
            inside = node.args
        if isinstance(node, ast.FunctionDef):
            inside = [node.args, *([node.returns] if node.returns else [])]
        unread.update(child for top in inside for child in ast.walk(top))
    return [
        Mutant(path, *_place(node, lines), _shown(node), _shown(other), n, other)
        for n, node in enumerate(ast.walk(tree))
        if node in run and node not in unread
        for other in replacements(node)
    ]


def _place(node: ast.AST, lines: list[str]) -> tuple[int, int, str]:
    return node.lineno, node.col_offset, lines[node.lineno - 1]


def _shown(node: ast.AST) -> str:
    if isinstance(node, ast.If | ast.While):
        return f"if {ast.unparse(node.test)}"
    return ast.unparse(node)


Functions = dict[types.CodeType, list[types.FunctionType]]


def functions_of(paths: set[str]) -> Functions:
    """Return the running process's functions from some files, by their code."""
    functions: Functions = {}
    ours: dict[str, bool] = {}  # by a code's name of its file; kernels/ has two names
    for item in gc.get_objects():
        if type(item) is types.FunctionType:
            name = item.__code__.co_filename
            if name not in ours:
                ours[name] = os.path.realpath(name) in paths
            if ours[name]:
                functions.setdefault(item.__code__, []).append(item)
    return functions


def put_in_place(root: pathlib.Path, mutant: Mutant, functions: Functions) -> bool:
    """Give the running process's functions the mutant's code; False where Python refuses it.

    A decorator, a registry and an importing module hold the function itself, whose code changes.
    """
    tree = ast.parse((root / mutant.path).read_text())
    original = compile(tree, mutant.path, "exec", dont_inherit=True)
    target = list(ast.walk(tree))[mutant.node]

    class Put(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return mutant.replacement if node is target else self.generic_visit(node)

    tree = ast.fix_missing_locations(Put().visit(tree))
    taken = False
    for before, after in _changed_functions(
        original, compile(tree, mutant.path, "exec", dont_inherit=True)
    ):
        for function in functions.get(before, ()):
            try:
                function.__code__ = after
            except ValueError:  # its closure would hold another number of variables
                return False
            taken = True
    return taken


def _changed_functions(
    original: types.CodeType, changed: types.CodeType
) -> Iterator[tuple[types.CodeType, types.CodeType]]:
    inner = [
        [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for code in (original, changed)
    ]
    if len(inner[0]) == len(inner[1]):
        for one, other in zip(*inner):
            yield from _changed_functions(one, other)
    if original.co_flags & inspect.CO_OPTIMIZED and original != changed:
        yield original, changed
