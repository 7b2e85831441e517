"""Plumbing, which a newcomer may skip: settings files, processes, checkpoints, records, optimizer."""
