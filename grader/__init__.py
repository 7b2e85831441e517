"""Runs programs that a model wrote, each confined to a process of its own, and judges their values."""
