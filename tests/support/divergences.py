"""Every divergence of the library's table, with a parameter of its own where it has one."""

from fused_sd.terms.divergence import DIVERGENCES, Divergence

PARAMETERS = {"jsd": 0.3, "mixed_kl": 0.4, "skew_kl": 0.7}  # away from the middle; else the default


def _made(name: str) -> tuple[Divergence, dict[str, float]]:
    known = DIVERGENCES[name]
    if known.setting is None:
        return name, {}
    given = [PARAMETERS[name]] if name in PARAMETERS else []
    divergence = known.setting(*given)
    return divergence, {known.parameter_name: getattr(divergence, known.parameter_name)}


# name: the divergence, and the keywords of ``reference.terms`` beside the name
EACH = {name: _made(name) for name in DIVERGENCES}
