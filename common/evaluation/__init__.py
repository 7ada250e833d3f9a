"""Answers of a model to a data file, with text metrics: the code behind `test_sft.py` and `test_ppo.py`."""
