"""GSPO on Megatron: reinforcement learning of Mixture-of-Experts language models."""

__version__ = "0.1.0"
