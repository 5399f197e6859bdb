"""DeepSeek-V4: config, weights and forward.

| file | responsibility |
| --- | --- |
| `config.py`, `json_fields.py` | what the engine reads of a checkpoint's config.json |
| `names.py` | one table of tensor names, storage formats and shapes |
| `shards.py`, `weights.py` | safetensors files to float tensors; `export.py` the way back |
| `batch.py`, `step.py` | a step's input and its index tables |
| `v4.py`, `attention.py`, `compressor.py`, `indexer.py`, `moe.py`, `rope.py` | the forward, in ops |
"""
