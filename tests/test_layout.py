"""The house: what may import what, what is public, and what must not shadow others."""

import ast
import pathlib
import subprocess
import sys

import pytest

import fused_sd

ROOT = pathlib.Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "fused_sd").glob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
INTEGRATIONS = sorted((ROOT / "integrations").rglob("*.py"))


def imports(path):
    """Modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_kernels_and_integrations_are_no_packages_of_their_own():
    """A package ``kernels`` on the path would hide the one that transformers imports."""
    for folder in ("kernels", "integrations"):
        assert not (ROOT / folder / "__init__.py").exists()
        link = ROOT / "fused_sd" / folder
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{folder}"
    assert not (ROOT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.name)
def test_the_library_imports_no_trainer_and_no_reference(path):
    for name in imports(path):
        assert name.split(".")[0] not in {"transformers", "trl", "verl", "peft", "triton"}, name
        assert name != "fused_sd.reference", name


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_know_their_twins_and_divergences_only(path):
    known = {"checks", "divergence", "rows", "selection", "sparse", "support", "vocab_shard"}
    known.add("kernels")
    allowed = {"torch", "triton", "fused_sd", *sys.stdlib_module_names}
    for name in imports(path):
        assert name.split(".")[0] in allowed, name
        if name.startswith("fused_sd."):
            assert name.split(".")[1] in known, name


@pytest.mark.parametrize("path", INTEGRATIONS, ids=lambda path: path.name)
def test_integrations_use_the_library_and_not_the_other_way_round(path):
    assert "kernels" not in {name.split(".")[0] for name in imports(path)}
    for library in LIBRARY:
        if library.name not in {"cli.py"}:
            assert not any("fused_sd.integrations" in name for name in imports(library)), library


def test_importing_the_library_needs_no_triton_and_no_trainer():
    check = (
        "import sys; import fused_sd; "
        "heavy = {'triton', 'transformers', 'trl', 'peft', 'verl'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_every_public_name_exists_and_is_documented():
    for name in fused_sd.__all__:
        value = getattr(fused_sd, name)
        if name not in {"FULL_VOCABULARY", "METRICS"}:
            assert (value.__doc__ or "").strip(), name


def test_every_public_function_says_what_it_takes():
    for name in fused_sd.__all__:
        value = getattr(fused_sd, name)
        if callable(value) and name.endswith("_loss"):
            for section in ("Args:", "Raises:", "Reference:"):
                if section == "Args:" and name == "grpo_loss":
                    continue
                if section == "Reference:" and name in {
                    "divergence_loss",
                    "topk_divergence_loss",
                }:
                    continue
                assert section in value.__doc__, (name, section)


def test_the_version_is_said_once():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{fused_sd.__version__}"' in text or 'dynamic = ["version"]' in text
