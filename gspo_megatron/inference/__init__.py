"""What runs inside a vLLM server; the only package that imports vllm."""
