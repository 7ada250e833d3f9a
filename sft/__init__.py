"""Stage 1: supervised fine-tuning on questions and answers."""
