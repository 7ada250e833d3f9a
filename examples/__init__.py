"""Runnable examples; nothing in the stages imports them."""
