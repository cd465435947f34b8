"""Importing this module registers fused_sd's engines for this process, whatever its environment.

``actor_rollout_ref.model.external_lib=fused_sd.integrations.verl.engines`` has verl import it where
it builds the model's settings, which each worker does before it chooses an engine.  No environment
variable is needed then, unless a trainer of ours is, too.

verl looks an engine up under (device, vendor) before the device alone, and its own engines have no
vendor: they stay as they are for every model that does not import this module.
"""

import importlib.util
import os

from fused_sd.checks.extras import require

require("verl", "verl")

from verl.utils.device import get_device_name, get_vendor

from fused_sd.integrations.verl import plugin

# as EngineRegistry.get_engine_cls reads them
DEVICE = os.environ.get("VERL_ENGINE_DEVICE") or get_device_name()
VENDOR = os.environ.get("VERL_ENGINE_VENDOR") or get_vendor()

for part in plugin.ENGINES:
    if part != "megatron" or importlib.util.find_spec("megatron") is not None:
        plugin.register_engine(part, (DEVICE,), VENDOR)
