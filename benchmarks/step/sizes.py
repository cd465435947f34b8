"""The sizes of the models, from their public configurations."""

from typing import NamedTuple


class Size(NamedTuple):
    """The settings in which the models of the family differ."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocab: int

    @property
    def backbone_parameters(self) -> int:
        """Number of weights in the layers' GEMMs, without norms and embeddings."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.key_value_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)


SIZES = {
    "qwen3-0.6b": Size(1024, 3072, 28, 16, 8, 128, 151936),
    "qwen3-1.7b": Size(2048, 6144, 28, 16, 8, 128, 151936),
    "qwen3-4b": Size(2560, 9728, 36, 32, 8, 128, 151936),
    # for the CPU
    "small": Size(256, 512, 4, 4, 2, 64, 32003),
    "tiny": Size(64, 128, 2, 4, 2, 16, 4099),
}
