"""Estimates of a run: parameters, FLOPs, memory, time, servers, batch."""
