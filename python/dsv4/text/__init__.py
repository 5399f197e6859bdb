"""Text: tokens, prompts and what the model writes.

| file | responsibility |
| --- | --- |
| `tokenizer.py` | text to ids and back, special tokens kept apart from user text |
| `detokenizer.py` | ids to text one by one, never splitting a character |
| `stop.py` | stop strings in a stream |
| `stream.py` | tokens of one answer to pieces: detokenizer, parser and stop strings |
| `chat.py`, `chat_format.py` | messages to a V4 prompt; the texts in which releases differ |
| `markers.py` | special tokens in text: what stands for one, and what only looks like one |
| `draft.py`, `pieces.py`, `id_store.py` | a prompt on its way to ids, in pieces that are remembered |
| `recall.py` | answers that come back, as the tokens that were sampled |
| `output.py` | generated text to reasoning, content and tool calls |
| `tools.py`, `json_schema.py` | which tools a chat shows; the schemas of their parameters, changed word by word |
| `form.py` | the form that an answer is to have, as a grammar |
| `call_grammar.py`, `lark.py` | tool calls as rules of it; pieces of grammars |
| `blocks.py` | pieces put together to text, thoughts and calls |
"""
