"""Stage 3: PPO against a reward."""
