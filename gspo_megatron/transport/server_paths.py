"""Paths of a server's HTTP interface that both the controller and our middleware within the server name."""

GENERATE = "/gspo/generate"
"""Ours: many responses in one binary stream (`token_frames.py`)."""
FINISH_UPDATE = "/finish_weight_update"
