"""What the model calls. `spec` says what an op means, `reference` is the oracle, `registry` chooses a backend
at start-up.

| file | responsibility |
| --- | --- |
| `spec.py` | name, shapes, dtypes, tolerance and source of each op |
| `tables.py` | index tables a step builds once and all layers read |
| `registry.py` | backends, what they need, and the choice printed at start-up |
| `reference/` | plain torch, batch-invariant: a token's result has the same bits however it was batched |

Backends import the specs and tables from here (`kernels -> ops`); the registry loads them by name. An op knows neither the
model nor the engine.
"""
