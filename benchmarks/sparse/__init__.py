"""Does training with certified sparse gradients go as with dense ones?

``online``: the demo's task, on-policy, with an adapter: its curves over several seeds.
``replay``: the whole model with its tied head on the same responses: how far the weights are apart.

    python -m benchmarks.sparse --seeds 0,1,2,3
"""
