"""Configurations of checkpoints that no model has: told in one line that names the file and the field."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from real.models.load import dimensions, load
from tests.real import tiny
from traces.errors import InputError


@pytest.mark.parametrize(
    ("model_type", "fields", "fault"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1, got 0"),
        ("qwen3_moe", {"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ("mixtral", {"vocab_size": 0}, "vocab must be greater than or equal to 1, got 0"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "top_k must be at most experts 8, got 9"),
        ("deepseek_v2", {"topk_method": "noaux"}, "topk_method must be a known name, got 'noaux'"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "n_group must be at least 1, got None"),
        ("deepseek_v3", {"n_group": 3}, "n_group must divide the 8 experts, got 3"),
        ("deepseek_v3", {"topk_group": 9}, "topk_group must be at most n_group 4, got 9"),
    ],
)
def test_a_configuration_that_no_model_has_is_told_with_its_file(
    model_type: str, fields: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    config = tiny.model(model_type).config
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**config.to_dict(), "model_type": model_type, **fields}, default=str))
    for read in (dimensions, load):
        with pytest.raises(InputError, match=re.escape(f"{file}: {fault}")):
            read(str(tmp_path))
