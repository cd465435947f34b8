"""Calls that run, or trust, what comes from outside: none but those that are listed, with why."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("fused_sd", "kernels", "integrations", "benchmarks", "docs")
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if not any(parent.is_symlink() for parent in path.parents)
)
SERIALISERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "commands.getoutput", "subprocess.getoutput"}
LOADERS = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "numpy.load", "np.load"}
RACES = {"tempfile.mktemp", "os.tempnam", "os.tmpnam", "tempfile.gettempdir"}
REQUESTS = re.compile(
    r"(requests|httpx|session|get_session\(\))\.(get|post|put|head|request)|.*urlopen"
)
# file, what is found there, and why it may stay
ALLOWED = {
    ("integrations/verdicts/confined.py", "compile"): "runs programs: it is what the script is for",
    ("integrations/verdicts/confined.py", "exec"): "the same; see programs.py for what holds them",
    ("fused_sd/teaching/parameters.py", "pickle"): "names the error of a copy; reads nothing",
    (
        "benchmarks/scale/cases.py",
        "torch.load",
    ): "reads what ranks that it has started have written to a folder of its own",
    ("fused_sd/credit/html.py", "Markup"): "marks a template that was filled with escaping",
    ("integrations/verl/teacher_group.py", "trust_remote_code"): "hands on what the user's own "
    "configuration says; False where it says nothing",
}


def name_of(node):
    """The dotted name of what is called, with ``()`` for calls inside it."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    if isinstance(node, ast.Call):
        return f"{name_of(node.func)}()"
    return node.id if isinstance(node, ast.Name) else ""


def keyword(call, name):
    found = [entry.value for entry in call.keywords if entry.arg == name]
    return found[0] if found else None


def is_constant(node, value):
    return isinstance(node, ast.Constant) and node.value is value


def is_temporary_path(node):
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return False
    return re.match(r"/(tmp|var/tmp)\b", node.value) is not None


def dangers_of_call(call):
    name = name_of(call.func)
    if name in SHELLS | RACES:
        yield name
    if name == "torch.load" and not is_constant(keyword(call, "weights_only"), True):
        yield name
    if name in LOADERS and not is_constant(keyword(call, "allow_pickle"), False):
        yield name
    if name in ("Markup", "markupsafe.Markup"):
        yield "Markup"
    if not is_constant(keyword(call, "shell"), False) and keyword(call, "shell") is not None:
        yield "shell"
    if REQUESTS.fullmatch(name) and keyword(call, "timeout") is None:
        yield "request without timeout"
    if name == "Environment" and not is_constant(keyword(call, "autoescape"), True):
        yield "Environment without autoescape"
    if keyword(call, "trust_remote_code") is not None:
        yield "trust_remote_code"
    if keyword(call, "verify") is not None and is_constant(keyword(call, "verify"), False):
        yield "certificates"


def dangers(tree):
    """What a file has of the above, with the line."""
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            for module in modules:
                if module.partition(".")[0] in SERIALISERS:
                    yield module.partition(".")[0], node.lineno
        elif isinstance(node, ast.Name) and node.id in BUILTINS:  # also by another name
            yield node.id, node.lineno
        elif isinstance(node, ast.Call):
            yield from ((found, node.lineno) for found in dangers_of_call(node))
        elif isinstance(node, ast.Dict):
            for key in node.keys:
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                    yield "trust_remote_code", key.lineno
        elif is_temporary_path(node) and id(node) not in documentation:
            yield "predictable name", node.lineno


def test_only_what_is_listed():
    found = {}
    for path in FILES:
        where = path.relative_to(ROOT).as_posix()
        for what, line in dangers(ast.parse(path.read_text(encoding="utf-8"))):
            found.setdefault((where, what), line)
    unknown = {
        f"{where}:{found[where, what]}: {what}" for where, what in found.keys() - ALLOWED.keys()
    }
    assert not unknown
    assert not ALLOWED.keys() - found.keys(), "no longer there: take it off the list"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "eval(x)",
        "exec(x)",
        "run = exec",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "yaml.load(x)",
        "np.load(x, allow_pickle=True)",
        "os.system(x)",
        "subprocess.run(x, shell=True)",
        "tempfile.mktemp()",
        "open('/tmp/x')",
        "urllib.request.urlopen(x)",
        "requests.get(x)",
        "get_session().head(x)",
        "Markup(x)",
        "Environment(loader=x)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "{'trust_remote_code': True}",
    ],
)
def test_each_is_found(source):
    assert list(dangers(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile(x)",
        "torch.load(x, weights_only=True)",
        "yaml.safe_load(x)",
        "subprocess.run([x])",
        "get_session().head(x, timeout=3)",
        "Environment(autoescape=True)",
        "def f():\n    '/tmp is a word here'",
    ],
)
def test_what_is_harmless_is_not(source):
    assert not list(dangers(ast.parse(source)))


def test_scripts_and_templates():
    """Shell scripts name no file that others can make before them; templates escape everything."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix == ".sh":
                text = path.read_text(encoding="utf-8")
                assert not re.search(r"/tmp|\beval\b|mktemp -u|curl|wget|--no-check", text), path
            if path.parent.name == "templates" and path.suffix == ".html":
                text = path.read_text(encoding="utf-8")
                assert not re.search(r"\|\s*safe|autoescape|<script|\son\w+=", text), path
