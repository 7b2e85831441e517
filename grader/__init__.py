"""Run programs written by a model, each confined to its own process, and judge the values that they return."""
