"""Does training with certified sparse gradients give the same model as with dense ones?

``online`` trains an adapter on the demo's task and compares learning curves over several seeds.
``replay`` trains the whole model, its tied head included, on fixed responses and compares weights.

    python -m benchmarks.sparse --seeds 0,1,2,3
"""
