"""verl's own tests of what this adapter touches, with the plugin in and its engines asked for.

``verl_own_tests.py`` runs those of a checkout, of which the wheel has a few.
"""

import importlib.util
import pathlib

from verl_own_tests import passed, run

# the wheel installs them as a package named tests; each passes without the plugin
FILES = (
    "plugin/test_platform_abstraction.py",
    "test_base_config_on_cpu.py",
    "trainer/ppo/test_core_algos_on_cpu.py",
    "trainer/ppo/test_dynamic_policy_losses_on_cpu.py",
    "trainer/ppo/test_loss_aggregation_on_cpu.py",
    "trainer/ppo/test_value_loss_normalization_on_cpu.py",
)


def test_verls_own_tests_pass_with_the_plugin():
    root = pathlib.Path(importlib.util.find_spec("verl").origin).parents[1]
    files = [root / "tests" / name for name in FILES]
    ran = run(files, root, plugin=True, timeout=300)
    for file, (found, said) in zip(files, ran):
        assert set(found.values()) == {"passed"}, f"{file}\n{said[-4000:]}"
    assert sum(len(passed(found)) for found, _ in ran) >= 45
