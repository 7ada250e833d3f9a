"""Stage 2: reward models, from preference pairs (`classification`) or scores (`regression`)."""
