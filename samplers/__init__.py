"""Samplers, which fill masked tokens: anywhere in a row, block by block, or left to right."""
