"""The entry point in fresh processes: what it registers, and what the doctor says of it."""

import json
import pathlib
import re
import subprocess

import plugin_dists
import pytest

ENGINES = ["TeachingEngine", "TeachingEngine", "FusedSDMegatronEngine"]
STOCK = ["FSDPEngineWithLMHead", "FSDPEngineWithLMHead", "MegatronEngineWithLMHead"]
LOSSES = {"fused_sd_topk": [True, False], "fused_sd_rlsd": [False, True]}  # use_topk, use_estimator
WHOLE = dict.fromkeys(("losses", "fsdp", "megatron", "trainer"), "registered")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each case of the worker found."""
    dists = plugin_dists.write(tmp_path_factory.mktemp("dists"))
    worker = pathlib.Path(__file__).parent / "plugin_worker.py"
    done = subprocess.run(
        [plugin_dists.PYTHON, worker, dists],
        env=plugin_dists.environment(dists),
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture
def result(results, request):
    """The case of the test's parameter."""
    found = results[request.param]
    assert "raised" not in found, found["raised"]
    return found


def of(*names):
    return pytest.mark.parametrize("result", names, indirect=True)


@of("engines_asked_for", "configuration_first", "engine_first", "losses_first")
def test_importing_verl_registers_losses_and_engines_whatever_is_imported_first(result):
    assert result["status"] == WHOLE
    assert result["losses"] == LOSSES
    assert result["engines"] == ENGINES
    assert result["value_engine"] == "FSDPEngineWithValueHead"
    assert "fused_sd" not in result["logged"]


@of("engines_not_asked_for")
def test_without_the_vendor_verl_keeps_its_engines_and_does_not_import_them(result):
    assert result["status"]["losses"] == "registered"
    assert result["losses"] == LOSSES
    assert "VERL_ENGINE_VENDOR=fused_sd" in result["status"]["fsdp"]
    assert "VERL_ENGINE_VENDOR=fused_sd" in result["status"]["megatron"]
    assert result["engines_imported"] == []
    assert result["engines"] == STOCK


@of("imported_again")
def test_registering_again_changes_nothing(result):
    assert result["before"]["status"] == WHOLE
    assert result["after"] == result["before"]


@of("plugins_switched_off")
def test_the_settings_register_the_losses_where_verl_loads_no_plugin(result):
    assert result["before"] is False
    assert result["after"] is True


@of("another_has_a_loss")
def test_a_loss_that_another_plugin_has_leaves_nothing_half_registered(result):
    assert "got thief.taken" in result["status"]
    assert "VERL_USE_EXTERNAL_PLUGINS" in result["status"]
    assert result["names"] == ["fused_sd_rlsd"]
    assert "fused_sd is not registered with verl (losses)" in result["logged"]


@of("another_has_an_engine")
def test_an_engine_key_that_another_plugin_has_leaves_nothing_half_registered(result):
    assert "got thief.Engine" in result["status"]["fsdp"]
    assert result["status"]["losses"] == result["status"]["megatron"] == "registered"
    assert result["engines"] == ["FSDPEngineWithLMHead", "Engine", "FusedSDMegatronEngine"]
    assert "fused_sd is not registered with verl (fsdp)" in result["logged"]


@of("doctor_all_well")
def test_the_doctor_finds_all_well(result):
    assert result["status"] == 0
    said = result["said"]
    assert "!" not in said
    assert said.endswith("all well\n")
    assert "0.9.1 (supported: >=0.9.1,<0.10; in " in said
    assert re.search(r"trainer +registered \(all \d+ seams found in verl\)", said)
    assert "fsdp2                        fused_sd.integrations.verl.teachers.TeachingEngine" in said
    assert "loss_mode=fused_sd_topk      fused_sd.integrations.verl.losses" in said


@of("doctor_without_engines")
def test_the_doctor_says_that_verls_engines_run_and_what_needs_ours(result):
    assert result["status"] == 0
    said = result["said"]
    assert "not set: verl's engines run; fused_sd_topk and impl_backend=fused_sd need" in said
    assert "fsdp                         works, not asked for: set VERL_ENGINE_VENDOR" in said
    assert "transformer_impl.FSDPEngineWithLMHead" in said


@of("doctor_switched_off")
def test_the_doctor_says_that_verl_was_told_to_load_no_plugin(result):
    assert result["status"] == 1
    assert "not loaded by verl; VERL_USE_EXTERNAL_PLUGINS must be auto" in result["said"]
    assert "none: no plugin is loaded" in result["said"]
    # the doctor loads the plugin, and must not report the engines that verl had then
    assert "! fsdp2                        verl.workers.engine.fsdp" in result["said"]
    assert "trainer                      works, once verl loads the plugin" in result["said"]


@of("doctor_of_misspelt_variables")
def test_the_doctor_marks_a_vendor_and_a_device_that_nobody_has(result):
    assert result["status"] == 1
    assert "! VERL_ENGINE_VENDOR           fused-sd: nobody registered engines" in result["said"]
    assert "! VERL_ENGINE_DEVICE           gpu: no engine, verl has some for " in result["said"]


@of("doctor_without_a_dependency")
def test_the_doctor_says_what_provides_a_module_that_verl_does_not_require(result):
    assert result["status"] == 1
    assert "verl.workers.engine_workers  fails: ModuleNotFoundError" in result["said"]
    assert "pip install 'verl[verl-core]'" in result["said"]


@of("doctor_of_a_development_verl")
def test_the_doctor_says_that_this_state_of_verl_was_not_tried(result):
    assert result["status"] == 0
    assert result["said"].endswith("\n1 not tried, marked ?\n")
    assert "? verl                         0.10.0.dev (in " in result["said"]
    assert "1dda039b9 was tried and no other commit" in result["said"]
    assert "trainer                      registered" in result["said"]


@of("doctor_broken_plugin")
def test_the_doctor_says_why_a_plugin_does_not_load(result):
    assert result["status"] == 1
    why = "broken fails: ModuleNotFoundError: No module named 'a_module_that_nobody_has'"
    assert why in result["said"]


@of("doctor_broken_itself")
def test_the_doctor_says_why_a_part_of_ours_does_not_load(result):
    assert result["status"] == 1
    assert "! fsdp                         failed: ImportError: not today" in result["said"]
    assert result["said"].count("FSDPEngineWithLMHead") == 2


@of("doctor_without_megatron")
def test_megatron_is_not_missed_where_it_is_not_installed(result):
    assert result["status"] == 0
    assert "megatron                     Megatron-Core is not installed" in result["said"]
    assert "fsdp                         registered" in result["said"]
    assert "fused_sd" not in result["logged"]


@of("doctor_without_entry_point")
def test_the_doctor_says_that_the_entry_point_is_not_installed(result):
    assert result["status"] == 1
    assert "no entry point; pip install fused_sd" in result["said"]


@of("doctor_another_has_a_loss")
def test_the_doctor_names_the_plugin_that_has_our_loss(result):
    assert result["status"] == 1
    assert "! losses" in result["said"]
    assert "loss_mode=fused_sd_rlsd      thief" in result["said"]


@of("doctor_of_another_verl")
def test_the_doctor_says_that_this_verl_is_not_supported(result):
    assert result["status"] == 1
    assert "verl must be >=0.9.1,<0.10, got 0.8.0" in result["said"]
    assert "1 problem, marked !" in result["said"]  # not one more for each part
    assert result["losses"] == []
    assert "fused_sd is not registered with verl (losses): verl must be" in result["logged"]
