"""Every dotted path that the README has documented can be imported."""

import pathlib
import pkgutil
import re

import pytest

README = pathlib.Path(__file__).parents[2] / "README.md"
# paths that a released README has named; they stay importable when the README changes
EVER_DOCUMENTED = {
    "fused_sd.LMHead",
    "fused_sd.SDPOLoss",
    "fused_sd.aggregation_weights",
    "fused_sd.credit",
    "fused_sd.integrations.adapter_teacher.make_teacher",
    "fused_sd.integrations.examples",
    "fused_sd.integrations.transformers.attach",
    "fused_sd.integrations.trl",
    "fused_sd.integrations.verl",
    "fused_sd.integrations.verl.config.FusedSDLossConfig",
    "fused_sd.integrations.verl.recipes",
    "fused_sd.plan",
    "fused_sd.sdpo_loss",
}
NEEDED = {
    "fused_sd.integrations.adapter_teacher": ("peft",),
    "fused_sd.integrations.transformers": ("transformers",),
    "fused_sd.integrations.trl": ("trl", "peft"),
    "fused_sd.integrations.verl.config": ("verl",),
    "fused_sd.integrations.verl.engines": ("verl",),
}


def documented():
    found = re.findall(r"\bfused_sd(?:\.[A-Za-z_]\w*)+", README.read_text())
    return {path.removesuffix(".NAME") for path in found} | EVER_DOCUMENTED


@pytest.mark.parametrize("path", sorted(documented()))
def test_a_documented_path_can_be_imported(path):
    for module, packages in NEEDED.items():
        if path == module or path.startswith(f"{module}."):
            for package in packages:
                pytest.importorskip(package)
    pkgutil.resolve_name(path)
