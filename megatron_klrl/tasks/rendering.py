"""How a plain question becomes the tokens that the policy sees, and the policy's tokens become an answer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BOX = "\\boxed{"


def render_prompt(tokenizer: "PreTrainedTokenizerBase", question: str) -> tuple[str, tuple[int, ...]]:
    """Text and token ids of one question.

    With a chat template the question is the user's message of a new conversation and the template opens the answer;
    without one it is the text itself, with the special tokens that the tokenizer adds to any text.
    """
    if tokenizer.chat_template is None:
        return question, tuple(tokenizer.encode(question))
    messages = [{"role": "user", "content": question}]
    text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template wrote the special tokens already; adding them again would give e.g. Llama a second BOS.
    return text, tuple(tokenizer.encode(text, add_special_tokens=False))


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` whose braces balance, or None.

    An escaped brace (`\{`, `\}`) is a symbol, not a delimiter. Of nested boxes the innermost last one counts.
    """
    start = text.rfind(_BOX)
    while start >= 0:
        content_start = start + len(_BOX)
        end = _closing_brace(text, content_start)
        if end is not None:
            return text[content_start:end]
        start = text.rfind(_BOX, 0, start)
    return None


def _closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the group opened just before `start`."""
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return position
        position += 1
    return None
