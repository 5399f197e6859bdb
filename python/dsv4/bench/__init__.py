"""`dsv4 bench`: traffic against any server of OpenAI's chat, and what came of it.

| file | has |
| --- | --- |
| `words.py`, `sizing.py` | text of a wanted length in tokens |
| `shapes.py`, `conversation.py`, `trace.py` | what is asked: sessions of turns |
| `client.py`, `connection.py`, `answer.py` | one request over HTTP, and what is seen of its answer |
| `load.py`, `lag.py`, `run.py` | when requests are sent; how late this process was; a whole run, stage by stage |
| `search.py`, `goals.py` | the highest rate that keeps the goals |
| `record.py`, `bootstrap.py`, `figures.py` | one request as figures need it; figures with intervals |
| `report.py`, `table.py`, `html.py`, `svg.py`, `compare.py` | how they are written, shown and compared |
"""
