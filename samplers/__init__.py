"""Filling in masked tokens: whole rows, block by block, or left to right."""
