"""Every Triton program says what it does and what it takes, and is launched by keyword."""

import ast
import pathlib

import pytest

KERNELS = pathlib.Path(__file__).parents[2] / "kernels"
PROGRAM_FILES = sorted(
    path for path in (KERNELS / "programs").glob("*.py") if path.name != "__init__.py"
)
LAUNCHING_FILES = [KERNELS / f"{name}.py" for name in ("entries", "rows", "selection", "sparse")]
LAUNCHERS = {"launch": 3, "_launch": 2, "_read_blocks": 4}  # with their own arguments


def jit_functions(path):
    """The ``@triton.jit`` functions of a file."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and "triton.jit" in map(
            ast.unparse, node.decorator_list
        ):
            yield node


def launches(path):
    """Calls in a file that launch a program, and the functions that pass a program on."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in LAUNCHERS:
            yield node


def launched_programs():
    """Names of the programs that are launched: the first arguments of those calls."""
    for path in LAUNCHING_FILES:
        for call in launches(path):
            program = call.args[0]
            if isinstance(program, ast.Attribute):  # else it is a launcher's own argument
                yield program.attr


def test_programs_and_launches_are_found():
    """The other tests here look at all of them, and pass if there are none."""
    defined = {function.name for path in PROGRAM_FILES for function in jit_functions(path)}
    launched = set(launched_programs())
    assert len(launched) == 19  # as tests/kernels/test_offline_compile.py compiles
    assert launched < defined


@pytest.mark.parametrize(
    "path", [*PROGRAM_FILES, KERNELS / "divergence.py"], ids=lambda path: path.stem
)
def test_every_device_function_has_a_docstring(path):
    for function in jit_functions(path):
        assert ast.get_docstring(function), function.name


@pytest.mark.parametrize("path", PROGRAM_FILES, ids=lambda path: path.stem)
def test_every_argument_of_a_launched_program_is_described_beside_it(path):
    launched, lines = set(launched_programs()), path.read_text().splitlines()
    for function in jit_functions(path):
        if function.name not in launched:
            continue
        docstring = " ".join(ast.get_docstring(function).split())
        assert "One program " in docstring, function.name
        assert "launches it" in docstring or "launch it" in docstring, function.name
        for argument in function.args.args:
            comment = lines[argument.lineno - 1].partition("#")[2].strip()
            assert comment, f"{function.name}: {argument.arg}"
            if argument.arg.endswith("_ptr"):  # shape and dtype
                assert comment.startswith("("), f"{function.name}: {argument.arg}"


@pytest.mark.parametrize("path", LAUNCHING_FILES, ids=lambda path: path.stem)
def test_programs_are_launched_by_keyword(path):
    """A pair of pointers that is swapped by position compiles and computes something else."""
    for call in launches(path):
        where = f"{path.name}:{call.lineno}"
        assert len(call.args) == LAUNCHERS[ast.unparse(call.func)], where
        assert not any(isinstance(argument, ast.Starred) for argument in call.args), where
    for node in ast.walk(ast.parse(path.read_text())):  # no launch but through those functions
        if isinstance(node, ast.Call):
            assert not isinstance(node.func, ast.Subscript), f"{path.name}:{node.lineno}"
