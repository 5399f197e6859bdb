"""What profiles are worth, and what takes a node from one million tokens to tens of millions, by `dsv4 simulate`."""
