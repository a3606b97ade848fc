"""What came after PAPO, one file each: what it adds, and nothing else."""
