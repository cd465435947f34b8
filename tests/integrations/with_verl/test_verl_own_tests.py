"""verl's own tests of what this adapter touches, with the plugin in and its engines asked for."""

import re
import subprocess

import plugin_dists

# the wheel installs them as a package named tests; each passes without the plugin
FILES = (
    "tests.plugin.test_platform_abstraction",
    "tests.test_base_config_on_cpu",
    "tests.trainer.ppo.test_core_algos_on_cpu",
    "tests.trainer.ppo.test_dynamic_policy_losses_on_cpu",
    "tests.trainer.ppo.test_loss_aggregation_on_cpu",
    "tests.trainer.ppo.test_value_loss_normalization_on_cpu",
)
RUN = """
import sys
import pytest
import verl
from fused_sd.integrations.verl import plugin

assert set(plugin.STATUS.values()) == {plugin.REGISTERED}, plugin.STATUS
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--pyargs", *sys.argv[1:]]))
"""


def test_verls_own_tests_pass_with_the_plugin(tmp_path):
    dists = plugin_dists.write(tmp_path)
    done = subprocess.run(
        [plugin_dists.PYTHON, "-W", "ignore", "-c", RUN, *FILES],
        env=plugin_dists.environment(dists, VERL_ENGINE_VENDOR="fused_sd"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) >= 45, done.stdout
