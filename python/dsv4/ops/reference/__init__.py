"""Plain torch ops, the oracle of every backend, on CPU or GPU.

Batch-invariant on the CPU: a token's result has the same bits whatever else is in the batch. Three rules keep
it so: matrix products have fixed shapes (tiles of rows, blocks of keys); of the transcendental functions only
exp, log1p and rsqrt are used, whose vector code has no scalar tail (sigmoid, silu, softplus and logaddexp
have one, so a result would depend on where in memory it lies); sums over few terms are written out in order.
"""
