"""Plumbing that knows nothing of the project: reading, writing, command lines, memory and cores."""
