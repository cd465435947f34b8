"""Hydra configurations for verl's ``main_ppo``: one method each, on top of verl's defaults."""
