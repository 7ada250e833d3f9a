"""Dialogues as hh-rlhf writes them: `\\n\\nHuman: …\\n\\nAssistant: …`, read turn by turn and written back to the letter.

A text before the first turn (a system prompt, say) is the prompt's context.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from common.record_types import Prompt

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(r"(?:\n\n|\A)(Human|Assistant):")


def is_transcript(text: str) -> bool:
    """Whether a text is written as hh-rlhf's dialogues are."""
    return text.startswith(HUMAN)


def transcript_turns(text: str) -> list[tuple[str, str]]:
    """The (speaker, text) turns of a transcript, without the one space after each colon and without what stands before the first.

    Raises ValueError where Human and Assistant do not take turns.
    """
    parts = _TURN.split(text)
    turns = [(speaker, said.removeprefix(" ")) for speaker, said in zip(parts[1::2], parts[2::2], strict=True)]
    for number, (speaker, _) in enumerate(turns):
        expected = ("Human", "Assistant")[number % 2]
        if speaker != expected:
            raise ValueError(f"turn {number + 1} is {speaker}'s, expected Human and Assistant in turn")
    return turns


def before_transcript(text: str) -> str | None:
    """What stands before the first Human turn, "" where it is nothing but white space; None where there is no such turn first."""
    first = _TURN.search(text)
    if first is None or first[1] != "Human":
        return None
    return text[: first.start()] if text[: first.start()].strip() else ""


def transcript_prompt(text: str) -> Prompt:
    """The prompt that a transcript ends in: with Human's turn, or with an empty turn of Assistant."""
    turns = transcript_turns(text)
    if turns[-1][0] == "Assistant":
        if turns[-1][1].strip():
            raise ValueError("the dialogue ends with an answer, expected it to end in Human's turn or in 'Assistant:'")
        turns.pop()
    return prompt_of_turns(turns)


def prompt_of_turns(turns: Sequence[tuple[str, str]], context: str = "") -> Prompt:
    said = [text for _, text in turns]
    return Prompt(said[-1], context, history=tuple(zip(said[:-1:2], said[1:-1:2], strict=True)))


def render_transcript(prompt: Prompt, answer: str = "") -> str:
    """The prompt without its context as hh-rlhf writes dialogues, `Assistant:` and the answer last."""
    turns = "".join(f"{HUMAN} {question}{ASSISTANT} {reply}" for question, reply in prompt.history)
    return f"{turns}{HUMAN} {prompt.question}{ASSISTANT}" + (f" {answer}" if answer else "")
