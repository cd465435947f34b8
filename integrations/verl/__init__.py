"""The verl adapter: fused self-distillation losses registered through verl's plugin mechanism.

verl itself is not changed.  Installing fused_sd is enough: verl imports the entry point
``verl.plugins: fused_sd``, which is ``fused_sd.integrations.verl.plugin``, in the driver and in
every Ray worker.  ``python -m fused_sd.integrations.verl doctor`` reports whether that worked.

The files, in the order in which a training step passes through them:

* ``trainer`` builds what the teacher reads (``batch_rollouts``, ``contexts``, ``sessions``,
  ``images``, ``teacher_sequences``), and may have a worker score it (``worker_scores``) or a
  teacher's own worker group read it (``teacher_group``, ``teacher_worker``, ``teacher_states``);
* ``engine`` and ``teachers`` (FSDP; ``adapter_teacher`` with LoRA), or ``megatron_engine`` and
  ``megatron_output``, compute each token's loss, log-probability and entropy from hidden states
  (``packed_rows``, ``head_request``, ``token_outputs``, ``vision_models``);
* ``losses`` turns these into the loss that verl aggregates.

``config`` and ``self_distillation`` hold the settings, ``run_checks`` and ``data_checks`` look at a
whole run; ``plugin`` registers everything, ``engines`` the engines alone.  Where a
comment explains verl's behaviour, it was read from verl 0.9.1.
"""

import contextlib

SUPPORTED_VERL = ">=0.9.1,<0.10"
"""verl 0.9.0 refuses top-k distillation under FSDP2; 0.10 has not been released."""

DEVELOPMENT_VERL = ">=0.10.0.dev0,<0.10.0a0"
"""verl's main branch, which keeps one number while it changes: a state of it may be older than the
newest release.  It is accepted if it has what ``seams`` lists."""

TRIED_COMMIT = "1dda039b9c6311889a9c9a26040677e1254814f9"
"""The commit of verl's main branch (2026-08-22) on which this adapter was tested."""

VENDOR = "fused_sd"
"""The value of ``VERL_ENGINE_VENDOR`` and ``fused_kernel_options.impl_backend`` for our engines."""

ENGINES = "fused_sd.integrations.verl.engines"
"""The value of ``actor_rollout_ref.model.external_lib`` that registers our engines in a worker."""

TRAINER_MODES = ("fused_sd_sync", "fused_sd_colocate_async")
"""The values of ``trainer.v1.trainer_mode`` that choose our trainers."""

TOPK_LOSS, RLSD_LOSS = "fused_sd_topk", "fused_sd_rlsd"
"""The values of ``distillation_loss.loss_mode`` that choose our losses."""

EVIDENCE_MIX = "evidence_mix"
"""Batch key of RLSD's mix at the current training step: (B,), present only if the mix changes."""

# Import verl before any module of this package.  verl loads our plugin while it is imported, and
# the plugin imports these modules: if one of them came first and imported verl itself, the plugin
# would find it half imported, and verl would drop the ImportError without a word.
with contextlib.suppress(ImportError):  # the doctor reports a missing verl
    import verl  # noqa: F401
