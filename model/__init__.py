"""The model: a Qwen2 backbone and a chunked output head."""
