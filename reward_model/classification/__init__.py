"""Reward model from preference pairs: Bradley-Terry."""
