"""Sampling with vLLM, in this process or on a server: the only place that knows how vLLM works."""
