"""A small world with a known truth: questions, the answers of a mixed crowd, and an oracle that judges any answer text."""
