"""What a run leaves to look at: metrics, samples, one page, comparisons."""
