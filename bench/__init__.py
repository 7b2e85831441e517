"""Speed and memory of the project beside plain implementations of the same science."""
