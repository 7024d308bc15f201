"""What the three model families see, literally. The templates are ours, written from what the families' own render."""

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_klrl.errors import UserError
from megatron_klrl.tasks.rendering import Framing, render_prompt
from tests.unit.tasks.characters import character_tokenizer

CHATML = (
    "{%- if messages[0].role == 'system' -%}"
    "{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- set messages = messages[1:] -%}"
    "DEFAULT"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
ASSISTANT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN25 = CHATML.replace("DEFAULT", "{%- else -%}{{ '<|im_start|>system\\n" + ASSISTANT + "<|im_end|>\\n' }}")
QWEN3 = CHATML.replace("DEFAULT", "")
LLAMA31 = (
    "{{ '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\\n\\n' }}"
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}{%- set messages = messages[1:] -%}"
    "{%- else -%}{%- set system = '' -%}{%- endif -%}"
    "{{ 'Cutting Knowledge Date: December 2023\\nToday Date: ' }}"
    "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    "{{ '\\n\\n' + system + '<|eot_id|>' }}"
    "{%- for message in messages -%}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content + '<|eot_id|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"
)
STEPS = Framing(instruction="Please reason step by step, and put your final answer within \\boxed{}.")
LLAMA_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


def qwen(template: str) -> PreTrainedTokenizerFast:
    return character_tokenizer(special=("<|im_start|>", "<|im_end|>"), template=template)


def llama() -> PreTrainedTokenizerFast:
    special = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return character_tokenizer(special=special, template=LLAMA31)


def test_qwen25_has_a_system_message_of_its_own() -> None:
    text, ids = render_prompt(qwen(QWEN25), "1+1?", STEPS)
    assert text == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n1+1?\n\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert qwen(QWEN25).decode(list(ids)) == text


def test_a_system_message_replaces_it() -> None:
    text, _ = render_prompt(qwen(QWEN25), "1+1?", Framing(system="Answer in \\boxed{}."))
    assert text == (
        "<|im_start|>system\nAnswer in \\boxed{}.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_qwen3_2507_has_none() -> None:
    text, _ = render_prompt(qwen(QWEN3), "1+1?")
    assert text == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_llama31_has_a_fixed_date_and_one_beginning(system: str | None) -> None:
    tokenizer = llama()
    text, ids = render_prompt(tokenizer, "1+1?", Framing(system=system))
    assert text == (
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{LLAMA_DATES}{system or ''}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert list(ids).count(tokenizer.convert_tokens_to_ids("<|begin_of_text|>")) == 1


def test_a_base_model_without_template_takes_an_instruction_and_no_system_message() -> None:
    tokenizer = character_tokenizer()
    assert render_prompt(tokenizer, "1+1?", Framing(instruction="Box it."))[0] == "1+1?\n\nBox it."
    with pytest.raises(UserError, match=r"no chat template.*leave system out"):
        render_prompt(tokenizer, "1+1?", Framing(system="Be brief."))
