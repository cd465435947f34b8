"""What is imported without its extra says which command installs it."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

from fused_sd.checks.extras import require

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("fused_sd", "kernels", "integrations")
# what is imported, the extra that it asks for, and the first package that it misses
IMPORTS = {
    "import fused_sd.integrations.trl": ("trl", "trl"),
    "import fused_sd.integrations.trl.sdpo": ("trl", "trl"),
    "import fused_sd.integrations.transformers": ("trl", "transformers"),
    "import fused_sd.integrations.adapter_teacher": ("trl", "transformers"),
    "import fused_sd.integrations.examples.sdpo": ("trl", "datasets"),
    "import fused_sd.integrations.verl.config": ("verl", "verl"),
    "import fused_sd.integrations.verl.engines": ("verl", "verl"),
    "import fused_sd.integrations.verdicts as v; v.MathsVerifier()": ("verdicts", "math_verify"),
    "import fused_sd.credit as c; c.print_map(c.CreditMap(()))": ("credit", "rich"),
    "import fused_sd.credit as c; c.credit_figure(c.CreditMap(()))": ("credit", "matplotlib"),
    "import fused_sd.demo.__main__ as d; d.main([])": ("demo", "trl"),
}


@pytest.fixture(scope="module")
def said():
    """The errors of all imports in a process that has none of the packages."""
    script = (
        "import sys\n"
        "for name in 'trl transformers peft datasets verl math_verify rich matplotlib'.split():\n"
        "    sys.modules[name] = None\n"
        f"for statement in {list(IMPORTS)!r}:\n"
        "    try:\n"
        "        exec(statement)\n"
        "    except (ImportError, SystemExit) as error:\n"
        "        print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return dict(zip(IMPORTS, run.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("statement", IMPORTS)
def test_an_import_without_its_extra_says_what_installs_it(said, statement):
    extra, package = IMPORTS[statement]
    says = rf"\b{package}\b.* must be installed here, got no such module"
    assert re.search(rf"{says}; pip install 'fused-sd\[{extra}\]'$", said[statement])


def test_what_is_installed_is_not_imported():
    require("trl", "json", "antigravity")
    assert "antigravity" not in sys.modules


def test_the_error_names_the_modules():
    with pytest.raises(ModuleNotFoundError, match=r"^no_such, nor_this must be") as caught:
        require("trl", "no_such", "torch", "nor_this")
    assert caught.value.name == "no_such"


def test_every_extra_that_is_named_exists():
    metadata = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    extras = metadata["project"]["optional-dependencies"]
    named = set()
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                named.add(node.args[0].value)
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for found in re.findall(r"(?:fused-sd|'\.)\[([a-z,-]+)\]", path.read_text()):
            named |= set(found.split(","))
    assert named >= {"trl", "verl", "demo", "verdicts", "credit"}
    assert named <= set(extras)
