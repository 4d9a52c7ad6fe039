"""From problems to packed rows of token ids: tokenizers, prompt streams, demonstrations, samples, packing."""
