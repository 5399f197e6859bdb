"""Text: tokens, prompts and what the model writes.

| file | responsibility |
| --- | --- |
| `tokenizer.py` | text to ids and back, special tokens kept apart from user text |
| `detokenizer.py` | ids to text one by one, never splitting a character |
| `stop.py` | stop strings in a stream |
| `chat.py` | messages to a V4 prompt |
| `output.py` | generated text to reasoning, content and tool calls |
"""
