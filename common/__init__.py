"""What the stages share: data, prompts, models, checkpoints, tracking."""
