"""What has to be measured and tried on a GPU, in pieces of minutes: docs/gpu.md."""
