"""The prompt text, to the letter: every stage and every trained model depends on it."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import UserError
from common.prompts import answer_text, clean_answer, render_prompt
from common.records import Prompt


def test_a_question() -> None:
    assert render_prompt(Prompt("Why?")) + answer_text("Because.") == "Question: Why?\nAnswer: Because."


def test_a_question_with_context() -> None:
    assert render_prompt(Prompt("Why?", "It rains.")) == "Question: Why?\nContext: It rains.\nAnswer:"


def test_a_dialogue() -> None:
    prompt = Prompt("And now?", history=(("Why?", "Because."), ("Really?", "Yes.")))
    assert render_prompt(prompt) == "Question: Why?\nAnswer: Because.\nQuestion: Really?\nAnswer: Yes.\nQuestion: And now?\nAnswer:"


def test_an_answer_comes_back_as_it_was() -> None:
    for answer in ("Because.", "    indented code\n", ""):
        assert clean_answer(answer_text(answer)) == answer
    assert clean_answer("Because.") == "Because."


class Template:
    """Stands for a tokenizer with a chat template."""

    chat_template: Any = "there is one"

    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize and add_generation_prompt
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"


def test_the_chat_format_is_the_tokenizers_own() -> None:
    prompt = Prompt("And now?", "It rains.", (("Why?", "Because."),))
    assert render_prompt(prompt, "chat", Template()) == "<user>Why?<assistant>Because.<user>And now?\n\nIt rains.<assistant>"
    assert answer_text("Yes.", "chat") == "Yes."


def test_a_tokenizer_without_template_is_an_error() -> None:
    tokenizer = Template()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="prompt_format: got chat"):
        render_prompt(Prompt("Why?"), "chat", tokenizer)
