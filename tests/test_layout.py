"""The house: what may import what, what is public, and what must not shadow others."""

import ast
import collections
import graphlib
import pathlib
import subprocess
import sys

import pytest

import fused_sd

ROOT = pathlib.Path(__file__).parent.parent
# What each room of the library may import beside itself; rooms are listed from the ground up.
TERMS = ("checks", "settings", "terms")
TWINS = (*TERMS, "head", "torch_kernels")
OBJECTIVES = (*TWINS, "engine", "objectives")
LOSSES = (*OBJECTIVES, "losses")
MEASURED = (*LOSSES, "measuring")
MAY_IMPORT = {
    "reference": (),
    "checks": (),
    "settings": ("checks",),
    "terms": ("checks", "settings"),
    "head": ("checks", "settings"),
    "torch_kernels": (*TERMS, "head"),
    "kernels": TWINS,
    "engine": TWINS,  # and the kernels by name, in engine/backend.py alone
    "objectives": (*TWINS, "engine"),
    "losses": OBJECTIVES,
    "teaching": ("checks", "head", "losses"),
    "credit": ("checks",),  # and public names
    "measuring": LOSSES,
    "verify": (*MEASURED, "reference"),
    "planning": MEASURED,
    "bench": (*MEASURED, "verify", "reference"),
    "integrations": ("checks", "credit", "teaching", "terms"),  # and public names
    "demo": ("checks", "credit", "integrations", "measuring"),
    "cli": ("credit", "measuring", "verify", "planning", "bench"),  # and public names
    "__main__": ("cli",),
    "__init__": (*LOSSES, "teaching", "planning"),  # planning on first use
}
# What the parts of ``integrations`` may import of each other beside themselves.
PARTS_MAY_IMPORT = {
    "transformers.py": ("shared",),
    "adapter_teacher.py": ("shared",),
    "shared": ("transformers",),
    "verdicts": (),
    "trl": ("shared", "transformers"),
    "verl": ("shared", "transformers"),
    "examples": ("trl", "verl", "verdicts"),
}
# the rooms that make the public names, and so cannot import them
INNER_ROOMS = {*OBJECTIVES, "kernels", "losses", "reference", "teaching"}
TRAINERS = {"transformers", "trl", "verl", "peft", "accelerate", "datasets", "megatron"}


def room_of(path):
    """The folder of fused_sd that a file lies in, or its own name where it lies in none."""
    parts = path.relative_to(ROOT).parts
    if parts[0] == "fused_sd":
        parts = parts[1:]
    return parts[0].removesuffix(".py")


FILES = sorted(
    path
    for folder in ("fused_sd", "kernels", "integrations")
    for path in (ROOT / folder).rglob("*.py")
    if not any(parent.is_symlink() for parent in path.parents)
)


def imports(path):
    """Modules that a file imports, anywhere in it; of names from ``fused_sd`` itself, those."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "fused_sd":
            yield from (f"fused_sd.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_kernels_and_integrations_are_no_packages_of_their_own():
    """A package ``kernels`` on the path would hide the one that transformers imports."""
    for folder in ("kernels", "integrations"):
        assert not (ROOT / folder / "__init__.py").exists()
        link = ROOT / "fused_sd" / folder
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{folder}"
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_files_of_tests_have_names_of_their_own():
    """Their folders are on the path: a process that a test starts would import the other file."""
    names = collections.Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    del names["conftest.py"]
    assert {name for name, count in names.items() if count > 1} == set()


def test_every_room_is_in_the_table():
    assert {room_of(path) for path in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_from_below_only(path):
    room = room_of(path)
    allowed = {*MAY_IMPORT[room], room}
    for name in imports(path):
        if not name.startswith("fused_sd."):
            continue
        imported = name.split(".")[1]
        is_public = imported in fused_sd.__all__ or imported == "__version__"
        assert is_public or imported in allowed, f"{room} imports {name}"
        assert not is_public or room not in INNER_ROOMS, f"{room} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_third_parties_are_imported_where_they_belong(path):
    room = room_of(path)
    for name in {name.split(".")[0] for name in imports(path)}:
        if name in TRAINERS:
            # measuring reads a model's configuration, which transformers knows
            assert room in {"integrations", "demo", "bench", "measuring"}, name
        if name == "triton":
            assert room in {"kernels", "measuring"}, name


def test_parts_of_the_integrations_import_few_others():
    for path in (path for path in FILES if room_of(path) == "integrations"):
        part = path.relative_to(ROOT / "integrations").parts[0]
        allowed = {part, *PARTS_MAY_IMPORT[part]}
        for name in imports(path):
            if name.startswith("fused_sd.integrations."):
                assert name.split(".")[2] in allowed, f"{path} imports {name}"


def test_verifiers_need_no_trainer():
    for path in (ROOT / "integrations" / "verdicts").glob("*.py"):
        third = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        assert third <= {"fused_sd", "math_verify"}, (path, third)
    confined = imports(ROOT / "integrations" / "verdicts" / "confined.py")  # runs without packages
    assert {name.split(".")[0] for name in confined} <= set(sys.stdlib_module_names)


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


def test_the_house_has_few_rooms_on_few_floors():
    """A room stands on the floor above the highest room that it imports; no two stand in a ring."""
    below = {room: set() for room in MAY_IMPORT}
    for path in FILES:
        names = [name.split(".")[1] for name in imports(path) if name.startswith("fused_sd.")]
        below[room_of(path)] |= {
            "__init__" if name in fused_sd.__all__ else name
            for name in names
            if name != room_of(path) and name not in ("__version__", "planning")
        } - {room_of(path)}
    order = list(graphlib.TopologicalSorter(below).static_order())
    floors = {}
    for room in order:
        floors[room] = 1 + max((floors[other] for other in below[room]), default=0)
    rooms = {room for room in MAY_IMPORT if not room.startswith("__")}
    assert len(rooms) <= 20, rooms
    assert max(floors.values()) <= 13, floors


def parameters_of(path):
    """Names and numbers of parameters of the functions in a file, options counted as one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            given = node.args
            names = [*given.posonlyargs, *given.args, *given.kwonlyargs]
            own = [name for name in names if name.arg not in ("self", "cls", "ctx")]
            yield node.name, len(own)


def test_functions_have_few_parameters():
    """A public loss has at most 14 beside its options, a function that losses call at most 7.

    Exempt are PyTorch operators, whose schema is flat, and Triton programs, whose arguments are the
    pointers and numbers of a launch.
    """
    found = {}
    inner = {*OBJECTIVES, "kernels", "losses"}
    for path in FILES:
        for name, count in parameters_of(path):
            if "programs" in path.parts:
                continue
            found[f"{path.relative_to(ROOT)}:{name}"] = count
            is_public = name in fused_sd.__all__
            is_operator = name in {"chunked_run", "sparse_gradients", "_"}
            if room_of(path) in inner and not is_public and not is_operator:
                assert count <= 7, (path, name, count)
    largest = {name: count for name, count in found.items() if count >= 15}
    assert set(largest) == {"fused_sd/planning/plan.py:plan"}, largest
    assert found["fused_sd/losses/divergence.py:divergence_loss"] <= 13


def test_a_loss_goes_through_six_files():
    """The stack from a named loss to the function on rows of logits, as the manual tells it."""
    script = (
        "import torch, traceback, fused_sd\n"
        "from fused_sd.torch_kernels import rows\n"
        "real = rows.divergence_\n"
        "def spy(*given):\n"
        "    files = [f.filename for f in traceback.extract_stack() if 'fused_sd' in f.filename]\n"
        "    files = [f.split('fused_sd/', 1)[1] for f in files]\n"
        "    print(*dict.fromkeys([*files, 'torch_kernels/rows.py']))\n"
        "    return real(*given)\n"
        "rows.divergence_ = spy\n"
        "h, w = torch.randn(4, 8, requires_grad=True), torch.randn(64, 8)\n"
        "fused_sd.gkd_loss(h, w, (h + 0.1).detach(), w)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [
        "losses/gkd.py",
        "losses/divergence.py",
        "engine/apply.py",
        "engine/operator.py",
        "objectives/divergence.py",
        "torch_kernels/rows.py",
    ]
