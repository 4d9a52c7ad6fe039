"""Paths of vLLM's HTTP interface that both the controller and our guards within the server name."""

GENERATE = "/inference/v1/generate"
FINISH_UPDATE = "/finish_weight_update"
