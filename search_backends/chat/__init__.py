"""Models behind an OpenAI-compatible server, and a vLLM server for a checkpoint."""
