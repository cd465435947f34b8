"""A real model teaches itself on this machine: ``python -m fused_sd.demo``.

SmolLM2-135M-Instruct knows plurals, yet asked ``cat ->`` it has no idea what is wanted.  Shown four
worked examples it answers nearly always.  Self-distillation moves the second behaviour into the
first: the model with the examples is the teacher of the model without them, and words that were
never trained on tell whether it learned the task or the words.
"""
