"""The trainers that are compared, as plan and tables need them; ``trainers`` builds them."""

from typing import NamedTuple

TOP_K = 100
JSD = 0.5


class Provider(NamedTuple):
    """A trainer and its line in the tables.

    Attributes:
        name: The name on the command line and in the results.
        objective: Providers of one objective are compared with each other.
        ours: Whether this is fused_sd.
        logits_bits: Bits of a logit that the loss reads, if the model is bf16.
        title: The name in the tables.
    """

    name: str
    objective: str
    ours: bool
    logits_bits: int
    title: str


# the most important pair comes first: a run without enough time leaves out the last ones
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
    )
}
