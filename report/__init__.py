"""What people look at: curves of runs."""
