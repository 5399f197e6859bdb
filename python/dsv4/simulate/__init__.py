"""Request traces against the real core in virtual time: `dsv4 simulate`, and `dsv4 trace` to make traces.

| file | responsibility |
| --- | --- |
| `device.py` | how long a step takes: a model on some GPUs as the coefficients of the core's step model |
| `calibrate.py` | an overhead and three factors from measured steps |
| `shapes.py` | which steps `dsv4 calibrate` has an engine run (`engine/measuring.py`) |
| `fitting.py` | a fit, judged by steps that were held back |
| `coefficients.py` | the file of a fit, for `--coefficients` |
| `engine.py` | the engine of a simulation from a model, GPUs and settings |
| `compare.py` | runs one trace under several policies |
| `table.py` | the comparison as a table |
| `plot.py` | memory and hit rate over time as a picture (needs the extra `plot`) |
| `records.py` | what generated traces are written with: exact ids, lengths from log-normal distributions |
| `agents.py` | traces of agent sessions from stated distributions |
| `traffic.py` | the same of conversations, rollouts, documents, and of all together |
| `workload.py` | traffic as a trace: of a file, a report, a dump or a server's metrics |
| `outcome.py`, `choice.py` | what a profile makes of it; which profile it should have, and why |

The replay itself is Rust (`rust/sim/src/replay`). Nothing here imports torch.
"""
