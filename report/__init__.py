"""What is made of the records of runs: curves, pages, lists and traces."""
