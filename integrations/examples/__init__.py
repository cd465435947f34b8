"""Complete scripts, one for each method: ``python -m fused_sd.integrations.examples.sdpo``."""

from fused_sd.checks.extras import require

require("trl", "datasets")
