"""Fused self-distillation losses inside verl, by its plugin mechanism; verl itself is not changed.

Installing fused_sd is enough: verl imports the entry point ``verl.plugins: fused_sd``, that is
``fused_sd.integrations.verl.plugin``, in the driver and in every Ray worker.  What came of that is
shown by ``python -m fused_sd.integrations.verl doctor``.
"""

import contextlib

SUPPORTED_VERL = ">=0.9.1,<0.10"
"""0.9.0 refuses top-k distillation under FSDP2; what 0.10 changes is not known yet."""

VENDOR = "fused_sd"
"""What ``VERL_ENGINE_VENDOR`` and ``fused_kernel_options.impl_backend`` are set to."""

TOPK_LOSS, RLSD_LOSS = "fused_sd_topk", "fused_sd_rlsd"
"""What ``distillation_loss.loss_mode`` is set to."""

EVIDENCE_MIX = "evidence_mix"
"""In the batch, (B,): RLSD's mix at this training step, where it changes."""

# verl first: while it loads the plugin, no module of this package is half imported
with contextlib.suppress(ImportError):  # the doctor tells what is missing
    import verl  # noqa: F401
