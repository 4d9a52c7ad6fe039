"""One real vLLM server, sent real weights by a real sender, asked by a real controller."""
