"""The guide's recipe lines are recipes."""

import re
import typing
from pathlib import Path

import pytest

from megatron_klrl.config import yaml_text
from megatron_klrl.config.data import AnySource, DataSection, EvalSampling

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs" / "guide" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", GUIDE, flags=re.DOTALL)


def section(block: str) -> DataSection:
    parsed = yaml_text.parse(block)
    assert list(parsed) == ["data"]
    return DataSection.model_validate(parsed["data"])


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_is_a_data_section(block: str) -> None:
    assert section(block).train


def test_every_task_is_described_and_all_but_the_default_one_shown() -> None:
    tasks = {typing.get_args(source.model_fields["task"].annotation)[0] for source in typing.get_args(AnySource)}
    described = set(re.findall(r"^\| `(\w+)` \|", GUIDE, flags=re.MULTILINE))
    sections = [section(block) for block in BLOCKS]
    shown = {source.task for each in sections for source in (each.train, *each.eval.values())}
    assert described == tasks
    assert shown == tasks - {"arithmetic"}
    assert any(isinstance(one, EvalSampling) and one.out_of_distribution for s in sections for one in s.eval.values())
