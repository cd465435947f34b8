"""Train a small real model by self-distillation on this machine: ``python -m fused_sd.demo``.

SmolLM2-135M-Instruct knows plurals, but the bare prompt ``cat ->`` does not say that one is wanted.
With four worked examples before the prompt it nearly always answers correctly.  The demo makes the
model with the examples the teacher of the model without them.  Accuracy on words that were never
trained on shows that the student learned the task and not a list of words.
"""
