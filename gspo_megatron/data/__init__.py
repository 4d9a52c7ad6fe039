"""Problems, prompts, samples and packed micro-batches of token ids."""
