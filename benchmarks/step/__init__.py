"""One whole SDPO step, as a user feels it: TRL's own trainers beside ours, on the same batch.

    python -m benchmarks.step --models qwen3-0.6b,qwen3-1.7b --out benchmarks/results/h200

A step is student forward, teacher forward in a longer context, loss, backward with activation
checkpointing, gradient clipping and AdamW, inside the trainer's own ``train()``; only the batch is
ours.  Models have random weights in the sizes of their public configurations.

``providers`` names what is compared, ``process`` measures one of them, ``plan`` decides what fits
into the time, ``report`` writes the tables.
"""
