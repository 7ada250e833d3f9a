"""The prompt text, in one place: what a model reads before it answers, and how an answer follows it.

`qa`: `Question: {question}\\nAnswer:` followed by ` {answer}` and EOS; a context stands in between as `\\nContext: {context}`, earlier
turns of a dialogue before it as `Question: …\\nAnswer: …\\n`. `chat`: the tokenizer's own template, whose answers have no leading space.
"""

from __future__ import annotations

from typing import Any, Literal

from common.errors import UserError
from common.record_types import Prompt

PromptFormat = Literal["qa", "chat"]

ANSWER_PREFIX = " "
"""What separates an answer from `Answer:` in the `qa` format."""


def render_prompt(prompt: Prompt, prompt_format: PromptFormat = "qa", tokenizer: Any = None) -> str:
    """The text that the model continues with an answer. `chat` needs the tokenizer; raises UserError where it has no template."""
    if prompt_format == "qa":
        return _render_qa(prompt)
    assert prompt_format == "chat", prompt_format
    assert tokenizer is not None, "the chat format needs a tokenizer"
    return _render_chat(prompt, tokenizer)


def _render_qa(prompt: Prompt) -> str:
    turns = "".join(f"Question: {question}\nAnswer:{ANSWER_PREFIX}{answer}\n" for question, answer in prompt.history)
    context = f"\nContext: {prompt.context}" if prompt.context else ""
    return f"{turns}Question: {prompt.question}{context}\nAnswer:"


def _render_chat(prompt: Prompt, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("prompt_format: got chat, but the model's tokenizer has no chat template, expected qa")
    messages = []
    for question, answer in prompt.history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    content = f"{prompt.question}\n\n{prompt.context}" if prompt.context else prompt.question
    messages.append({"role": "user", "content": content})
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program of its makers', run in a sandbox
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"prompt_format: the chat template of the model's tokenizer cannot be rendered: {reason}; mend it, or use qa"
        ) from None


def answer_text(answer: str, prompt_format: PromptFormat = "qa") -> str:
    """The answer as it follows the rendered prompt."""
    return f"{ANSWER_PREFIX}{answer}" if prompt_format == "qa" else answer


def clean_answer(text: str) -> str:
    """A generated text as an answer: without the space that separates it from the prompt. Reward pipelines and evaluations see this."""
    return text.removeprefix(ANSWER_PREFIX)
