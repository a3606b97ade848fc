"""What every room may use: one-sentence errors, progress, processes, the optimizer."""
