"""From rows as people keep them to prompts as tensors."""
