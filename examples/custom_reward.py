"""A reward function of one's own: short, polite answers that end. In `reward_config.pipeline`:

{type: function, path: ../examples/custom_reward.py:polite_and_short}
"""


def polite_and_short(prompts: list[str], responses: list[str], ended: list[bool]) -> list[float]:
    """One number per answer; lists have one entry per answer. Other columns of the data can be asked for by name."""
    scores = []
    for _question, response, finished in zip(prompts, responses, ended, strict=True):
        polite = any(word in response.lower() for word in ("please", "glad", "thank", "happy to", "welcome"))
        short = max(0.0, 1.0 - len(response.split()) / 50)
        scores.append(1.0 * polite + short - (0.0 if finished else 1.0))
    return scores
