"""The documented path of ``make_teacher`` and ``AdapterTeacher``, teachers for PEFT students."""

from fused_sd.checks.extras import require

require("trl", "transformers", "peft")

from fused_sd.integrations.shared.adapter_teacher import AdapterTeacher, make_teacher

__all__ = ["AdapterTeacher", "make_teacher"]
