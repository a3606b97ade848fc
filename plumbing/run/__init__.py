"""What a run is made of: settings, parts, the vLLM engine, checkpoints."""
