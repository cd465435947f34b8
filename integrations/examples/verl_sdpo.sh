#!/usr/bin/env bash
# SDPO on sums with verl: the teacher sees a successful sibling, or what was wrong in the response.
#
# Usage: verl_sdpo.sh MODEL [further settings of verl]; needs GPUs and vLLM.
# Other methods: RECIPE=rlsd, opsd or sd_zero.
set -euo pipefail

model=${1:?"usage: verl_sdpo.sh MODEL [further settings of verl]"}
shift
data=$(mktemp -d)
python -m fused_sd.integrations.examples.verl_arithmetic "$data"
exec python -m verl.trainer.main_ppo \
    --config-path=pkg://fused_sd.integrations.verl.recipes \
    --config-name="${RECIPE:-sdpo}" \
    actor_rollout_ref.model.path="$model" \
    data.train_files="$data/train.parquet" \
    data.val_files="$data/test.parquet" \
    data.max_prompt_length=256 \
    data.max_response_length=1024 \
    reward.custom_reward_function.path=pkg://fused_sd.integrations.examples.verl_arithmetic \
    'trainer.logger=[console]' \
    "$@"
