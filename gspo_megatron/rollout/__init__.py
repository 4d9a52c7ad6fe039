"""Rollout: vLLM servers, their client, the controller, and the live weight update. The only place that imports vllm."""
