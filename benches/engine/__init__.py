"""The engine as a whole: `python3 -m benches.engine`."""
