"""Capacity before any GPU is rented: weights, cache and workspace of one GPU, and what fits into the rest.

| file | responsibility |
| --- | --- |
| `weights.py` | bytes of weights by group and dtype, in all and on one GPU |
| `cache.py` | pages, tokens and requests in a pool under each snapshot policy; the engine sizes its pool here too |
| `workspace.py` | an upper bound of everything else, from limits alone |
| `outside.py` | what lies on a GPU beside these |
| `graphs.py` | which steps are captured |
| `ranks.py` | the least GPUs whose plan holds a request |
| `build.py` | all of it together for one question |
| `report.py` | as text with every formula, or as JSON |

Nothing here imports torch.
"""
