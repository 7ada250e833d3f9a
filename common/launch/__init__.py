"""The only place that knows of trainers, strategies and processes."""
