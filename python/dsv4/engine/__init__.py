"""The engine: it turns the core's plans into forward passes and sampled tokens into streams.

Two processes. What runs beside the caller knows nothing of torch; what runs beside the device knows nothing of text.

| file | responsibility |
| --- | --- |
| `buffers.py` | the buffer that a plan is written into, read by field |
| `device.py` | one step on the device: page table, copies, forward, sample; launched without waiting |
| `graphs.py`, `extends.py` | steps as CUDA graphs: of single tokens, with chunks of prompts |
| `ranked.py`, `dealt.py` | the same on one of several ranks |
| `warmup.py`, `progress.py` | what a start compiles and captures; how far it is |
| `loop.py` | plan, launch, commit; one step in flight or two |
| `device_errors.py` | whether a step failed or the device is gone |
| `liveness.py` | whether the engine is idle, at work or stuck |
| `routing.py` | who asks, how urgent, what the prefix is worth: hints for the core |
| `request.py`, `prompt.py` | what the engine keeps per request, what callers get back; prompts as arrays |
| `process.py` | the engine's own process: messages, steps, news |
| `messages.py`, `link.py` | what the two processes say to each other, and the socket |
| `child.py`, `remote.py` | a process that is watched; starting an engine's |
| `group.py`, `follower.py` | the ranks as rank 0 has them; the process of another one |
| `rank_messages.py`, `meeting.py`, `rank_count.py` | what they say to each other, where they meet, how many there are |
| `answers.py` | from news to text, log-probabilities and stop strings |
| `frontend.py` | what callers need to know of a model |
| `counts.py`, `iterations.py`, `steps.py` | statistics over all processes of an engine; of steps by size; a record of each |
| `kv_events.py`, `profile.py` | the cache told to routers; a trace by torch's profiler |
| `late.py` | how much was compiled or captured after the start |
| `checks.py`, `costs.py` | settings that cannot be; what ways to resume cost before a step was measured |
| `build.py` | config -> weights, cache, model, core; the memory plan printed at start |
| `memory.py`, `taken.py` | whether that fits into memory, before it is taken; what was taken |
| `async_engine.py` | the engine behind asyncio, in a process of its own that is started again when it is lost |
| `llm.py`, `whole.py` | blocking use from Python, without another process; Ctrl-C in it |
| `measuring.py` | steps of designed shapes, timed, for `dsv4 calibrate` |
| `sampler.py` | logits to tokens |
| `grammars.py`, `masks.py` | grammars of answers, compiled; which tokens they let come next |
| `bars.py` | texts that look like markup, barred letter by letter |
| `compiler.py` | requests whose grammar is being compiled |

Which way imports go is in docs/architecture.md.
"""
