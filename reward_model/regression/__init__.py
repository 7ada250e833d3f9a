"""Reward model from scores: regression."""
