"""Vision-language models: their families, weights, adapters and packed rows."""
