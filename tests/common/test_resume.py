"""What --resume says where the command line no longer means what it did."""

from pathlib import Path
from typing import cast

import pytest
from pydantic import BaseModel

from common.checkpoint import Manifest
from common.errors import UserError
from common.resume import ResumePoint


class Settings(BaseModel):
    model_name: str


def test_a_model_folder_that_the_run_did_not_begin_with_comes_with_the_setting_that_names_it(tmp_path: Path) -> None:
    before, now = tmp_path / "step-000002", tmp_path / "step-000004"
    before.mkdir()
    (tmp_path / "config.yaml").write_text(f"model_name: {before}\n")
    point = ResumePoint(tmp_path, before, cast("Manifest", None))
    with pytest.raises(UserError) as refused:
        point.check_config(Settings(model_name=str(now)))
    assert "has moved" not in refused.value.problems[0]
    now.mkdir()
    with pytest.raises(UserError) as refused:
        point.check_config(Settings(model_name=str(now)))
    assert refused.value.problems[0] == (
        f"model_name: got {now}, but the run began with {before}; a resumed run keeps it "
        f"(model_name={before} says it where a link such as `latest` has moved since)"
    )
