"""What is compared, as plan and tables need it; ``trainers`` builds them."""

from typing import NamedTuple

TOP_K = 100
JSD = 0.5
EVIDENCE_MIX = 0.5


class Provider(NamedTuple):
    """One line of the tables.

    Attributes:
        objective: providers of one objective are compared.
        ours: whether it is fused_sd.
        logits_bits: of the logits its loss is formed from, where the model is bf16.
        title: in the tables.
    """

    name: str
    objective: str
    ours: bool
    logits_bits: int
    title: str


# the most important pair first: what is left out where time is short comes last
PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("trl-topk", "topk", False, 16, "TRL SDPO, top-100 + tail"),
        Provider("fused-topk", "topk", True, 32, "fused_sd, top-100 + tail"),
        Provider("trl-full", "full", False, 16, "TRL SDPO, full"),
        Provider("trl-distillation", "full", False, 32, "TRL DistillationTrainer (chunked), full"),
        Provider("fused-full", "full", True, 32, "fused_sd, full"),
        Provider("trl-sampled", "sampled", False, 16, "TRL SDPO, sampled"),
        Provider("fused-sampled", "sampled", True, 32, "fused_sd, sampled"),
        Provider("fused-rlsd", "rlsd", True, 32, "fused_sd, RLSD (TRL has none)"),
    )
}
