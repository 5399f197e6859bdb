"""What the model calls. `spec` says what an op means, `reference` is the oracle, `registry` chooses a backend
at start-up.

| file | responsibility |
| --- | --- |
| `spec.py` | name, shapes, dtypes, tolerance and source of each op |
| `tables.py` | index tables a step builds once and all layers read |
| `weight.py`, `quantised.py` | matrices as a checkpoint stores them; activations that several products share |
| `forms.py` | what a backend says of each of its forms of an op |
| `registry.py` | which form runs a call: by machine and `--backend` at start, by arguments when it comes |
| `reference/` | plain torch, batch-invariant: a token's result has the same bits however it was batched |

Backends import specs and tables from here (`kernels -> ops`); `dsv4.backends` puts both together. An op knows neither the
model nor the engine.
"""
