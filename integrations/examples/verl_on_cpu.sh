#!/usr/bin/env bash
# verl_sdpo.sh on a machine without a GPU, for a small model: rollouts come from transformers, and
# two workers train with gloo.  It shows whether a recipe runs, not how fast.
#
# Usage: verl_on_cpu.sh MODEL [further settings of verl]
# Other methods: RECIPE=rlsd, opsd or sd_zero.
set -euo pipefail

model=${1:?"usage: verl_on_cpu.sh MODEL [further settings of verl]"}
shift
export VERL_USE_EXTERNAL_MODULES=fused_sd.integrations.examples.verl_on_cpu
export VERL_PLATFORM=cpu
export VERL_ENGINE_DEVICE=cuda  # where verl's engines and fused_sd's are registered; they run on CPUs
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
here=$(cd "$(dirname "$0")" && pwd)
precision='{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}'
exec "$here/verl_sdpo.sh" "$model" \
    trainer.device=cpu \
    trainer.n_gpus_per_node=2 \
    +ray_kwargs.ray_init.num_gpus=2 \
    ray_kwargs.ray_init.num_cpus=32 \
    +ray_kwargs.ray_init.include_dashboard=false \
    transfer_queue.backend.SimpleStorage.num_data_storage_units=1 \
    actor_rollout_ref.rollout.name=transformers \
    actor_rollout_ref.rollout.dtype=float32 \
    actor_rollout_ref.rollout.agent.num_workers=1 \
    actor_rollout_ref.rollout.agent.agent_loop_config_path="$here/verl_on_cpu/agents.yaml" \
    actor_rollout_ref.rollout.agent.default_agent_loop=seeded \
    actor_rollout_ref.rollout.max_num_seqs=64 \
    reward.num_workers=1 \
    data.dataloader_num_workers=0 \
    data.train_batch_size=8 \
    actor_rollout_ref.actor.ppo_mini_batch_size=8 \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=4096 \
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision=$precision" \
    actor_rollout_ref.actor.fsdp_config.use_torch_compile=false \
    +actor_rollout_ref.model.override_config.attn_implementation=sdpa \
    "$@"
