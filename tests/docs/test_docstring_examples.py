"""Every name that the API pages show has an example in its docstring, and the example runs.

An example that imports a package which is not installed here is only compiled.
"""

import ast
import doctest
import importlib.util
import inspect
import pkgutil

import pytest
from manual import MODEL, entries

MOST_LINES = 12


def docstring(entry):
    """An entry's docstring, or that of an instance's class; None of a plain value."""
    found = pkgutil.resolve_name(entry)
    has_own = isinstance(found, type) or inspect.isroutine(found)
    owner = found if has_own else type(found)
    return (owner.__doc__ or "") if owner.__module__.startswith("fused_sd") else None


def is_complete(source):
    """Whether all packages that a source imports are here."""
    for node in ast.walk(ast.parse(source)):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if any(importlib.util.find_spec(name.partition(".")[0]) is None for name in names):
            return False
    return True


@pytest.mark.parametrize("entry", entries())
def test_an_example_is_short_and_runs(entry, request):
    home = ""
    if entry.startswith("integrations."):
        home, entry = str(request.getfixturevalue("home")), f"fused_sd.{entry}"
    text = docstring(entry)
    if text is None:
        return
    test = doctest.DocTestParser().get_doctest(text.replace(MODEL, home), {}, entry, None, None)
    assert test.examples, f"{entry} has no example in its docstring"
    assert sum((e.source + e.want).count("\n") for e in test.examples) <= MOST_LINES
    if is_complete("".join(example.source for example in test.examples)):
        runner, said = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS), []
        runner.run(test, out=said.append)
        assert not runner.failures, "".join(said)
