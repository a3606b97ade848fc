"""The embedded default: a task, a tiny model, and the lessons that warm it up. Runs anywhere."""

import plumbing  # noqa: F401  before torch: how its threads wait
