"""Prompts of every form, and all that is wrong with others."""

import json
from pathlib import Path

import pytest
import torch

from eagle3_ray.errors import DataError
from eagle3_ray.evaluation.prompts import PromptRules, prompt_of_sample, read_prompts
from tests.unit.generation.world import CHATML, VOCAB_SIZE, make_tokenizer

RULES = PromptRules(VOCAB_SIZE, 200, 40)
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def read(tmp_path: Path, *lines: object, num_prompts: int = 80, template: str | None = CHATML) -> list[str]:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    tokenizer = make_tokenizer(template)
    prompts = read_prompts(path, tokenizer, num_prompts, RULES)
    return [str(tokenizer.decode(prompt.token_ids)) for prompt in prompts]


WHY = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"prompt": "Why?"}, WHY),
        ({"turns": ["Why?", "And then?"], "category": "maths"}, WHY),
        ({"messages": CHAT}, WHY),
        ({"messages": CHAT[:1]}, WHY),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}, WHY),
        (
            {"messages": [*CHAT, *CHAT]},
            WHY[: WHY.index("<|im_start|>a")] + "<|im_start|>assistant\nBecause.<|im_end|>\n" + WHY,
        ),
        ({"text": "Why do you ask"}, "Why do you ask"),
    ],
)
def test_each_form_ends_where_the_assistant_has_to_go_on(tmp_path: Path, line: object, expected: str) -> None:
    assert read(tmp_path, line) == [expected]


def test_without_a_chat_template_a_prompt_is_plain_text_and_a_chat_is_refused(tmp_path: Path) -> None:
    assert read(tmp_path, {"prompt": "Why?"}, template=None) == ["Why?"]
    with pytest.raises(DataError, match="no chat template"):
        read(tmp_path, {"messages": CHAT}, template=None)


def test_no_more_prompts_are_read_than_asked_for(tmp_path: Path) -> None:
    assert len(read(tmp_path, *[{"prompt": "Why?"}] * 5, "no JSON", num_prompts=5)) == 5


def test_all_that_is_wrong_is_told_at_once_by_line(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read(
            tmp_path,
            "{",
            {"prompt": " "},
            {"turns": []},
            {"prompt": 3},
            {"messages": CHAT[1:]},
            {"text": "a " * 400},
            {"x": 1},
        )
    text = str(error.value)
    assert "7 prompts cannot be used" in text and text.count("\n  line ") == 7
    for part in (
        "line 1: not JSON",
        "line 2: its prompt holds no text",
        "line 3: its turns holds no text",
        "line 4: its prompt holds no text",
        "line 5: only the assistant speaks",
        "and 40 to come, are more than the verifier's context of 200",
        "line 7: expected exactly one of the keys",
        "lower --max-new-tokens",
    ):
        assert part in text


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(DataError, match="holds no lines"):
        read_prompts(tmp_path / "p.jsonl", make_tokenizer(), 3, RULES)


def test_ids_outside_the_vocabulary_and_empty_prompts_are_named() -> None:
    assert "id 400, the verifier's vocabulary ends at 319" in RULES.find_problem(torch.tensor([3, 400]))
    assert "no token is left" in RULES.find_problem(torch.empty(0, dtype=torch.int64))
    assert RULES.find_problem(torch.ones(160, dtype=torch.int64)) == ""
    assert RULES.find_problem(torch.ones(161, dtype=torch.int64)) != ""
    assert PromptRules(VOCAB_SIZE, None, 40).find_problem(torch.ones(10**6, dtype=torch.int64)) == ""


def test_a_samples_prompt_is_what_stands_before_its_first_supervised_token() -> None:
    ids = torch.arange(6)
    assert prompt_of_sample("s", ids, torch.tensor([0, 0, 0, 1, 0, 1]).bool()).token_ids.tolist() == [0, 1, 2]
    assert prompt_of_sample("s", ids, torch.zeros(6).bool()).token_ids.tolist() == list(range(6))
