"""Prompt text and ids; extraction of the box."""

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_klrl.tasks.rendering import last_boxed, render_prompt


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{}", ""),
        (r"\boxed{2", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{2\}", None),
        ("\\boxed{2\\", None),
        (r"\boxed 5", None),
        ("5", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


def test_chat_template_renders_literally(tokenizer) -> None:
    text, token_ids = render_prompt(tokenizer, "calc5+4-1")
    assert text == "<|im_start|>calc5+4-1<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(list(token_ids)) == [
        "<|im_start|>", "calc", "5", "+", "4", "-", "1", "<|im_end|>",
    ]  # fmt: skip


def test_chat_template_marks_the_response(tokenizer) -> None:
    conversation = [{"role": "user", "content": "rev31"}, {"role": "assistant", "content": "\\boxed{13}"}]
    batch = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    assert tokenizer.decode(batch["input_ids"]) == "<|im_start|>rev31<|im_end|>\\boxed{13}<eos>"
    response = [token for token, marked in zip(batch["input_ids"], batch["assistant_masks"], strict=True) if marked]
    assert tokenizer.decode(response) == "\\boxed{13}<eos>"


def _word_tokenizer_with_bos() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_plain_text_gets_its_special_tokens_once() -> None:
    tokenizer = _word_tokenizer_with_bos()
    assert render_prompt(tokenizer, "a a") == ("a a", (0, 3, 3))
    tokenizer.chat_template = "<s>{{ messages[0]['content'] }}{% if add_generation_prompt %} a{% endif %}"
    assert render_prompt(tokenizer, "a") == ("<s>a a", (0, 3, 3))
