"""Whether code of other packages is as it was when it was last read: records of fingerprints.

A fingerprint is that of a syntax tree without docstring, comments and formatting.
"""

import ast
import hashlib
import importlib
import inspect
import json
import textwrap

import pytest


def overridden(cls, upstream):
    """Methods of other packages, by the beginnings of their modules, that ours stand before."""
    found, ours = {}, set()
    for one in cls.__mro__:
        written = {name: code for name, code in vars(one).items() if is_written(code)}
        if one.__module__.startswith("fused_sd"):
            ours.update(written)
        elif one.__module__.startswith(upstream):
            for name in ours & written.keys():
                found[f"{one.__name__}.{name}"] = written[name]
                ours.discard(name)
    return found


def is_written(code):
    """Whether it is a function from a file, not one that a dataclass made."""
    return inspect.isfunction(code) and inspect.unwrap(code).__code__.co_filename != "<string>"


def compare(name, seams, path):
    """Fail if a seam is gone, is not recorded or is relied on no longer, or has changed.

    ``seams`` returns what is relied on, name by name.
    """
    try:
        code = seams()[name]
    except (AttributeError, ImportError):
        pytest.fail(f"{name} is gone")
    except KeyError:
        pytest.fail(f"{name} is recorded but relied on no longer: record anew")
    versions = seen(path).get(name)
    assert versions, f"{name} is relied on but not recorded: record it once it is understood"
    assert fingerprint(code) in versions.values(), (
        f"{name} changed: {installed(code)} differs from {', '.join(versions)}; "
        f"read it in {inspect.getsourcefile(inspect.unwrap(code))}, then record it"
    )


def record(seams, path):
    """Add the installed versions; forget what is relied on no longer."""
    before, after = seen(path), {}
    for name, code in sorted(seams.items()):
        after[name] = {**before.get(name, {}), installed(code): fingerprint(code)}
    path.write_text(json.dumps(after, indent=1) + "\n")


def seen(path):
    return json.loads(path.read_text()) if path.exists() else {}


def installed(code):
    """The package and its version, which it has itself where it runs from a checkout."""
    package = code.__module__.split(".")[0]
    return f"{package} {importlib.import_module(package).__version__}"


def fingerprint(code):
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(code)))
    return hashlib.sha256(outline(ast.parse(source)).encode()).hexdigest()[:16]


def outline(node):
    """A syntax tree as text, without docstrings, and alike in every version of Python."""
    if isinstance(node, list):
        return f"[{','.join(map(outline, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, ast.FunctionDef | ast.ClassDef):
            value = value[1:] if ast.get_docstring(node, clean=False) is not None else value
        if name not in ("ctx", "kind", "type_comment") and value not in (None, []):
            parts.append(f"{name}={outline(value)}")
    return f"{type(node).__name__}({','.join(parts)})"
