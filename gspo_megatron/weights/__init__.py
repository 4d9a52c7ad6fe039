"""The table between Hugging Face and Megatron names, and who holds what. Pure Python: no torch."""
