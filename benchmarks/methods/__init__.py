"""The papers' claims, tried on tasks of a size for one CPU.

experiments.py   what is compared, on which task, at which size: written down before it is run
arms.py          the methods and their settings
tasks/           the tasks: their questions, base models and verifiers
train.py         a method's training; revision.py: SD-Zero's phases; discovery.py: test time
runs.py          the runs of an experiment; records.py: their results on disk
claims.py        the claims, as contrasts between methods (outcomes.py, statistics.py)
report.py        the page docs/claims.md and its pictures (figures.py)
in_verl.py       one experiment again, by verl's main_ppo
"""
