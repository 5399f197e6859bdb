"""The engine: it turns the core's plans into forward passes and sampled tokens into streams.

| file | responsibility |
| --- | --- |
| `buffers.py` | the buffer that a plan is written into, read by field |
| `device.py` | one step on the device: page table, copies, forward, sample; launched without waiting |
| `loop.py` | plan, launch, commit; one step in flight or two |
| `device_errors.py` | whether a step failed or the device is gone |
| `liveness.py` | whether the engine thread is idle, at work or stuck |
| `routing.py` | who asks, how urgent, what the prefix is worth: hints for the core |
| `request.py` | what the engine keeps per request; what callers get back |
| `output.py` | from sampled ids to text, log-probabilities and stop strings |
| `build.py` | config -> weights, cache, model, core; the memory plan printed at start |
| `memory.py` | whether that fits into memory, before it is taken |
| `async_engine.py` | the engine on a thread of its own behind asyncio |
| `llm.py` | blocking use from Python |
| `sampler.py` | logits to tokens |

Which way imports go is in docs/architecture.md.
"""
