"""HTTP: from a socket to `AsyncEngine.generate` and back.

| file | responsibility |
| --- | --- |
| `server.py`, `protocol.py` | uvicorn with draining; one connection: headers, slow readers, refusals that arrive |
| `listen.py`, `loading.py` | the listening sockets; answers while the model loads |
| `connections.py` | how many connections there may be, and taking them |
| `app.py` | routes; the key; what every request passes through |
| `keys.py`, `caller.py`, `limits.py` | keys and tenants; who sends a request; what a tenant may use |
| `lanes.py`, `turnstile.py` | threads for long work; how many requests begin in a turn of the event loop |
| `request_log.py`, `logs.py` | a line for every request; logging as text or JSON on a thread |
| `service.py` | what handlers share: engine, names, tokenizing off the event loop |
| `http.py` | the door of POST endpoints: body limits, JSON, disconnects, errors |
| `sse.py` | a stream: late headers, keep-alive comments, terminal events |
| `fields.py`, `params.py`, `known_fields.py` | reading a body: types and bounds, sampling parameters, what becomes of each documented field |
| `conversation.py` | messages, tools and thinking of a chat, to a prompt |
| `reply.py` | one choice of an answer: outputs put together, whole or as they come |
| `dialect.py`, `dialects.py` | what a dialect says of itself; those that are served |
| `openapi.py`, `openapi_requests.py`, `openapi_answers.py`, `schema.py` | the document of all endpoints |
| `generation.py` | choices of a request run against the engine and merged; token counts |
| `openai_chat.py`, `openai_completions.py` | OpenAI's dialects; `openai_usage.py` is common to both |
| `responses.py`, `responses_input.py` | OpenAI's Responses: answers; bodies as a conversation |
| `anthropic.py`, `anthropic_input.py` | Anthropic's dialect: answers; bodies as a conversation |
| `grammar.py` | where requests ask for answers of a certain form |
| `strict_tools.py`, `custom_tools.py` | tools whose calls fit their schema; tools that take text |
| `parts.py`, `noise.py`, `thoughts.py` | contents of messages; what is left out of them; thoughts in opaque fields |
| `warnings.py` | the header that says what was left out of a request |
| `routing.py` | tenant, urgency, session and retention of a request |
| `prefixes.py` | pinned prefixes, ended sessions |
| `admin.py` | what only an operator may see and do |
| `stats.py`, `recent.py`, `static.py` | what the server does now; the last requests; the page that shows both |
| `info.py` | models, health, metrics, version, tokenize, detokenize |
| `errors.py`, `absent.py` | error bodies; endpoints that are not here |
| `metrics.py`, `accounting.py`, `tracing.py` | Prometheus, as data; what is counted of a generation; spans |

A new dialect is one file with a handler and a `Dialect`, and its name in `dialects.py`. Nothing here is imported by the engine.
"""
