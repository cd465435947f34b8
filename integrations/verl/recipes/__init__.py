"""Hydra configurations for verl's ``main_ppo``: a method each, on top of verl's own."""
