"""How a plain question becomes the tokens that the policy sees, and the policy's tokens become an answer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_klrl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BOX = "\\boxed{"
# Llama's templates write a date into every prompt, some of them today's. Prompts must not change from day to day.
_TEMPLATE_DATE = "26 Jul 2024"


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """What stands around a question.

    Attributes:
        system: the system message; None leaves it to the chat template, which may have one of its own.
        instruction: follows the question in the user's message, after an empty line.
    """

    system: str | None = None
    instruction: str | None = None


def render_prompt(
    tokenizer: "PreTrainedTokenizerBase", question: str, framing: Framing | None = None
) -> tuple[str, tuple[int, ...]]:
    """Text and token ids of one question.

    With a chat template the question is the user's message of a new conversation and the template opens the answer;
    without one it is the text itself, with the special tokens that the tokenizer adds to any text.

    Raises:
        UserError: a system message, and no chat template to put it into.
    """
    framing = framing or Framing()
    content = question if framing.instruction is None else f"{question}\n\n{framing.instruction}"
    if tokenizer.chat_template is None:
        if framing.system is not None:
            problem = "a system message is set, but the model's tokenizer has no chat template to put it into"
            raise UserError(problem, field="data", fix="leave system out, or save a chat_template.jinja with the model")
        return content, tuple(tokenizer.encode(content))
    system = [] if framing.system is None else [{"role": "system", "content": framing.system}]
    messages = [*system, {"role": "user", "content": content}]
    text: Any = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, date_string=_TEMPLATE_DATE
    )
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
