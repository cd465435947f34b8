"""One whole SDPO training step: TRL's own trainers beside this library's, on the same batch.

    python -m benchmarks.step --models qwen3-0.6b,qwen3-1.7b

A step is student forward, teacher forward in a longer context, loss, backward with activation
checkpointing, gradient clipping and AdamW, inside the trainer's own ``train()``; only the batch is
made here.  Models have random weights in the sizes of their public configurations.

``providers`` lists the trainers that are compared, ``plan`` decides which of them are measured in
the given time, ``process`` measures one of them in a process of its own, ``report`` makes tables.
"""
