"""A recipe on top of verl's configuration, as ``main_ppo`` composes it."""

import copy
import functools

import yaml
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

RECIPES = "fused_sd.integrations.verl.recipes"


def composed(recipe: str, *overrides: str) -> DictConfig:
    """Compose a recipe; overrides are ``name=value``, or ``+name=value`` of what it lacks."""
    config = copy.deepcopy(_as_it_is(recipe))
    for override in overrides:
        name, value = override.split("=", 1)
        is_new = name.startswith("+")
        OmegaConf.update(config, name.lstrip("+"), yaml.safe_load(value), force_add=is_new)
    return config


@functools.cache  # Hydra takes a second
def _as_it_is(recipe: str) -> DictConfig:
    given = ["actor_rollout_ref.model.path=model", "trainer.n_gpus_per_node=2"]
    if recipe == "opd":  # its teacher has no default
        given.append("distillation.worker_group.model_path=teacher")
    with initialize_config_module(RECIPES, version_base=None):
        return compose(recipe, overrides=given)
