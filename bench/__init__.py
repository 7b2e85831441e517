"""Speed and memory of the project compared with plain implementations of the same computation."""
