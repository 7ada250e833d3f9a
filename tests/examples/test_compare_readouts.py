"""The tables of readouts over several backbones and data sets."""

from __future__ import annotations

import json

from examples.compare_readouts import BUILT, DATA, EPOCHS
from examples.readout_results import markdown
from tests.reward_model.test_compare_readouts import SHOWN


def test_a_table_for_each_backbone_with_the_rule_first() -> None:
    values = json.loads(SHOWN.json())
    lines = markdown({"gpt_neo": {"a": values, "b": values}, "t5": {"a": values}}).splitlines()
    column = "some_pairs: accuracy on 20 pairs of 7 questions"
    assert lines[0] == f"| gpt_neo, 1.2 M parameters | {column} | {column} | parameters | core seconds of a training |"
    rule = "0.62 (the longer answer wins)"
    assert lines[2] == f"| *a rule without a model* | {rule} | {rule} | 0 |  |"
    cell = "0.62 (0.50 to 0.75) [0.25, 0.88]"
    assert lines[3] == f"| last_token | {cell} | {cell} | 129 | 2.0 |"
    assert lines[4].startswith("| mean_pool | **0.75** (0.75 to 0.75) [0.25, 0.88] |")
    assert "States of the backbone, once: 12, 12 core seconds." in lines
    assert lines.count(lines[2]) == 1 and len([line for line in lines if line.startswith("| *a rule")]) == 2


def test_every_data_set_and_backbone_has_its_settings() -> None:
    assert DATA.keys() == EPOCHS.keys() and BUILT.keys() == {"gpt_neo", "t5"}
