"""The manual names everything, its links lead somewhere, its tables and commands are right."""

import ast
import dataclasses
import importlib.util
import re
import shlex

import pytest
from manual import DOCS, PAGES, ROOT, blocks, code, entries, name_of, prose

import fused_sd
from fused_sd.cli import build_parser

LINK = re.compile(r"\[[^\]]*\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]*))?\)")
DEFAULTS = re.compile(r"<!-- defaults: (\w+) -->\n\n((?:\|.*\n)+)")
FOUR_WRITTEN_ELSEWHERE = ("claims.md", "choosing.md", "official_runs.md", "scale.md")
VERL = ROOT / "integrations" / "verl"
README = ROOT / "README.md"


def anchors(path):
    """The places of a page that a link may name, as mkdocs and GitHub call them."""
    text = path.read_text()
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    slugs = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    for target, anchor in LINK.findall(prose(page)):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), f"{target}#{anchor}"


WRITTEN = re.compile(r"<!-- \w+: python.*?<!-- end -->", re.S)  # by a command


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_are_short_and_so_are_their_lines(page):
    if name_of(page) in FOUR_WRITTEN_ELSEWHERE:
        return
    lines = WRITTEN.sub("", page.read_text()).splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 120]


def test_the_readme_is_a_first_page():
    text = README.read_text()
    lines = text.splitlines()
    assert len(lines) <= 150
    assert len(text.encode()) <= 10_000
    assert not [line for line in lines if len(line) > 120]
    for target in re.findall(r"\]\((?!https:)([^)#]+)(?:#[^)]*)?\)", text):
        assert (ROOT / target).is_file(), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_dotted_names_are_there(page):
    text = page.read_text()
    for path in re.findall(r"`((?:\w+/)+\w+\.(?:py|sh|md))`", text):
        homes = (ROOT, ROOT / "fused_sd")  # a room's files are named without the latter
        is_ours = any((home / path.partition("/")[0]).is_dir() for home in homes)
        assert not is_ours or any((home / path).exists() for home in homes), path
    for dotted in set(re.findall(r"\bfused_sd(?:\.[A-Za-z_]\w*)+", text)):
        place, names = ROOT, dotted.removesuffix(".NAME").split(".")
        while names and (place / names[0]).is_dir():
            place = place / names.pop(0)
        if names and (place / f"{names[0]}.py").exists():
            place = place / f"{names.pop(0)}.py"
        if names:  # a name of a module or of a class in it
            source = place if place.is_file() else place / "__init__.py"
            assert re.search(rf"\b{names[0]}\b", source.read_text()), dotted


def exported(path):
    """The names in a module's ``__all__``, read and not imported."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            yield from ast.literal_eval(node.value)


def test_every_public_name_has_an_entry_in_the_reference():
    shown = entries()
    assert len(set(shown)) == len(shown)
    library, adapters = (
        {entry.rpartition(".")[2] for entry in shown if entry.startswith(folder)}
        for folder in ("fused_sd.", "integrations.")
    )
    assert set(fused_sd.__all__) - library == set()
    modules = (ROOT / "integrations").rglob("*.py")
    assert adapters == {name for module in modules for name in exported(module)}


def test_every_metric_of_a_loss_is_explained():
    named = set(code((DOCS / "guides" / "metrics.md").read_text()))
    assert set(fused_sd.METRICS) - named == set()
    assert policy_metrics() - named == set()


def policy_metrics():
    """The names that ``policy_loss`` knows with a teacher and a reference, as its refusal says."""
    import torch

    token = torch.zeros(1)
    with pytest.raises(ValueError, match="metrics must be one of") as refusal:
        fused_sd.policy_loss(
            torch.zeros(1, 2),
            torch.zeros(3, 2),
            token.long(),
            token,
            evidence=fused_sd.Evidence(),
            teacher_log_probs=token,
            reference_log_probs=token,
            kl_coefficient=1.0,
            reduction="sum",
            metrics=("nonsense",),
        )
    rule = str(refusal.value).partition(", got")[0]
    return set(re.findall(r"\b[a-z]+_[a-z_]+|\bevidence\b", rule))


def tables():
    for page in PAGES:
        for found in DEFAULTS.finditer(page.read_text()):
            yield pytest.param(found[1], found[2], id=f"{name_of(page)}: {found[1]}")


def defaults_of(name):
    """A configuration's defaults by their names."""
    if name == "FusedSDLossConfig":  # read, because verl is elsewhere
        tree = ast.parse((VERL / "config.py").read_text())
        (found,) = [
            node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name
        ]
        given = [node for node in found.body if isinstance(node, ast.AnnAssign)]
        plain = [node for node in given if isinstance(node.value, ast.Constant)]
        return {node.target.id: node.value.value for node in plain}
    if name == "Options":
        config = fused_sd.Options
    else:
        pytest.importorskip("trl")
        from fused_sd.integrations import trl

        config = getattr(trl, name)
    defaults = {}
    for field in dataclasses.fields(config):
        made = field.default_factory is not dataclasses.MISSING
        defaults[field.name] = field.default_factory() if made else field.default
    return defaults


@pytest.mark.parametrize("name, table", [*tables()])
def test_a_table_has_the_defaults_of_the_code(name, table):
    defaults = defaults_of(name)
    for row in table.splitlines()[2:]:
        names, values = (code(cell) for cell in row.split("|")[1:3])
        assert names, row
        for setting, value in zip(names, values * (len(names) // len(values)), strict=True):
            assert ast.literal_eval(value) == defaults[setting], setting


def commands():
    for page in PAGES:
        lines = "".join(text for _, text in blocks(page, "bash")).replace("\\\n", " ").splitlines()
        spans = [
            span for span in code(prose(page)) if re.match(r"(fused_sd|make|python -m) \w", span)
        ]
        for line in dict.fromkeys([*lines, *spans]):
            yield pytest.param(line, id=f"{name_of(page)}: {line[:60]}")


@pytest.mark.parametrize("line", [*commands()])
def test_a_command_is_one_that_there_is(line):
    words = shlex.split(line, comments=True)
    if words[0] == "fused_sd" and len(words) > 2:
        build_parser().parse_args(words[1:])
    elif words[0] == "fused_sd":
        assert words[1] in build_parser().format_help()
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[0] == "pip":
        extras = re.findall(r"\[([\w,]+)\]", words[2])
        for extra in [name for names in extras for name in names.split(",")]:
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    else:
        assert words[:2] == ["python", "-m"]
        module = words[2].removesuffix(".NAME")
        if module.partition(".")[0] in ("fused_sd", "benchmarks"):
            assert importlib.util.find_spec(module) is not None
        for setting in words[3:]:
            check_verl_setting(setting)


def check_verl_setting(setting):
    name, _, value = setting.partition("=")
    if name == "--config-name":
        assert (VERL / "recipes" / f"{value}.yaml").exists()
    loss = name.removeprefix("distillation.distillation_loss.")
    if loss != name:
        assert loss in {"loss_mode", "_target_", *defaults_of("FusedSDLossConfig")}
