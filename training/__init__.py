"""A run: its state, one update of its weights, and how it continues on another number of processes."""
