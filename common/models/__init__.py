"""Models: backbones, score readouts, loading."""
