"""What makes a run go: settings, data, models, engines, files. The method reads without it."""
