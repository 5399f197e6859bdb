"""dsv4's core beside the prefix caches and block managers of other engines, on this machine.

| file | responsibility |
| --- | --- |
| `rust/` | a package of its own, outside the workspace: dsv4, a floor, Dynamo's router index, kvbm-logical |
| `isolate.py` | loads single modules of a big package without its dependencies |
| `sglang.py`, `vllm.py` | Python peers, and dsv4 beside them in the same process through `ours.py` |
| `fetch.py` | takes the peers' files from the package index |
| `report.py` | the table of aims, and the growth pictures |
| `__main__.py` | runs all that is there, names what is not and why |
"""
