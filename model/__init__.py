"""The network: a Qwen2 backbone and its chunked output head."""
