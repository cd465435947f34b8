"""All that is measured on a GPU machine without network, in two stages.

    python -m benchmarks.session 1 --out OUT     whether it is right, what each part takes
    python -m benchmarks.session 2 --out OUT     peers, scaling, sparse gradients, a training step

``--dry`` runs the same lines at tiny sizes on a CPU.  benchmarks/notes.md says what to prepare.
"""
