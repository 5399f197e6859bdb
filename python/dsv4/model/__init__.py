"""DeepSeek-V4: config, weights and forward.

| file | responsibility |
| --- | --- |
| `config.py`, `json_fields.py` | what the engine reads of a checkpoint's config.json |
| `generation_config.py` | defaults of sampling, and the ids that end an answer |
| `names.py` | one table of tensor names, storage formats and shapes |
| `parallel.py` | TP, DP and EP: which layouts are possible, and a rank's share of each tensor |
| `shards.py`, `survey.py` | safetensors files: what is where, and whether it is the model; `quantization.py` what is refused |
| `weights.py` | tensors, as floats or packed, from `files.py` or made up by `dummy.py`; `export.py` the way back |
| `source.py` | where a model is |
| `layout.py` | layers and cache as data |
| `batch.py`, `step.py` | a step's input and its index tables |
| `v4.py`, `attention.py`, `compressor.py`, `indexer.py`, `moe.py`, `hyper.py`, `norm.py`, `rope.py` | the forward, in ops |
| `scope.py`, `stack.py`, `beside.py` | weights under a prefix; several products of one input; parts of a step beside each other |
| `rank.py`, `deal.py`, `cut.py`, `fold.py`, `ranked.py` | the same on one of R ranks: what they say, which tokens are where, attention, compressors, the forward |
"""
