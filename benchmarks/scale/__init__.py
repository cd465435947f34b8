"""``docs/scale.md``: memory, traffic and predicted time of the losses on ranks that share the head.

``cases`` runs small losses on real ranks and counts their memory and traffic, ``tables`` makes the
page's tables from ``fused_sd.plan``, and ``python -m benchmarks.scale`` writes the page.
"""
