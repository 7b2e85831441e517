"""Training: the state of a run, one update, and resuming on another number of processes."""
