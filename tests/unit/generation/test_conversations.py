"""JSONL lines to ids and loss masks, against masks put together by hand and transformers' own."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from eagle3_ray.errors import DataError, VerifierError
from eagle3_ray.generation import conversations
from eagle3_ray.generation.conversations import Conversation, Turn, index_lines, iter_lines, parse_conversation
from eagle3_ray.generation.loss_mask import TokenizedSample, TokenRules, load_tokenizer, tokenize_conversation
from tests.unit.generation.world import (
    CHATML,
    CHATML_WITH_TAG,
    COUNTING,
    REFUSING,
    SHOUTING,
    THINKING,
    TRIMMING,
    VOCAB_SIZE,
    WITHOUT_PROMPT,
    make_tokenizer,
)

RULES = TokenRules(max_seq_len=1000, skip_first_tokens=1, vocab_size=VOCAB_SIZE)
CHAT = Conversation(
    turns=(
        Turn("system", "You are fine."),
        Turn("user", "Hello there"),
        Turn("assistant", "Hello! Wie geht's, 😀?"),
        Turn("user", "Why?"),
        Turn("assistant", "Because."),
    ),
    text="",
)


def tokenize(conversation: Conversation, template: str | None = CHATML, rules: TokenRules = RULES) -> TokenizedSample:
    return tokenize_conversation(conversation, make_tokenizer(template), rules)


def supervised_text(sample: TokenizedSample, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The runs of supervised tokens, decoded."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.loss_mask.astype(int), [0]])))
    return [str(tokenizer.decode(sample.input_ids[a:b].tolist())) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def by_hand(conversation: Conversation) -> tuple[list[int], list[bool]]:
    """ChatML written piece by piece: special tokens keep the pieces from merging."""
    tokenizer = make_tokenizer(None)
    ids: list[int] = []
    mask: list[bool] = []
    for turn in conversation.turns:
        for piece, is_answer in (
            (f"<|im_start|>{turn.role}\n", False),
            (f"{turn.content}<|im_end|>", turn.role == "assistant"),
            ("\n", False),
        ):
            piece_ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids += piece_ids
            mask += [is_answer] * len(piece_ids)
    return ids, mask


@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_TAG])
def test_mask_covers_what_the_assistant_says_and_its_end_of_turn_token(template: str) -> None:
    sample = tokenize(CHAT, template)
    ids, mask = by_hand(CHAT)
    assert sample.input_ids.tolist() == ids
    assert sample.loss_mask.tolist() == mask
    assert sample.input_ids.dtype == np.int64 and sample.loss_mask.dtype == np.bool_


def test_template_without_generation_tag_gives_the_mask_of_the_same_template_with_it() -> None:
    messages = [{"role": turn.role, "content": turn.content} for turn in CHAT.turns]
    expected: Any = make_tokenizer(CHATML_WITH_TAG).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    sample = tokenize(CHAT, CHATML)
    assert sample.input_ids.tolist() == expected["input_ids"]
    assert sample.loss_mask.tolist() == [bool(bit) for bit in expected["assistant_masks"]]


def test_ids_are_those_of_the_chat_template() -> None:
    messages = [{"role": turn.role, "content": turn.content} for turn in CHAT.turns]
    for template in (CHATML, TRIMMING, WITHOUT_PROMPT, THINKING):
        expected: Any = make_tokenizer(template).apply_chat_template(messages, return_dict=True)
        assert tokenize(CHAT, template).input_ids.tolist() == expected["input_ids"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TRIMMING, ["Hi.<|im_end|>", "So.<|im_end|>"]),
        (CHATML, [" Hi.\n<|im_end|>", "So. <|im_end|>"]),
        (THINKING, [" Hi.\n<|im_end|>", "(think)So. <|im_end|>"]),
        (WITHOUT_PROMPT, [" Hi.\n<|im_end|>", "So. <|im_end|>"]),
    ],
)
def test_mask_follows_templates_that_trim_or_think_or_have_no_generation_prompt(
    template: str, expected: list[str]
) -> None:
    turns = (Turn("user", "Why?"), Turn("assistant", " Hi.\n"), Turn("user", "Ask"), Turn("assistant", "So. "))
    sample = tokenize(Conversation(turns, ""), template)
    runs = supervised_text(sample, make_tokenizer(template))
    if template == WITHOUT_PROMPT:  # its own blank before the text may have merged into one token with it
        runs = [run.lstrip() for run in runs]
        expected = [run.lstrip() for run in expected]
    assert runs == expected


def test_token_that_merges_header_and_text_is_not_supervised() -> None:
    # Without special tokens around the text, " you" is one token that begins in the header and ends in the text.
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    turns = (Turn("user", "Why?"), Turn("assistant", "you ask"))
    sample = tokenize_conversation(Conversation(turns, ""), tokenizer, RULES)
    assert " you" in [tokenizer.decode([number]) for number in sample.input_ids.tolist()]
    assert supervised_text(sample, tokenizer) == [" ask"]


def test_chat_that_the_assistant_opens_is_supervised_from_its_own_text_on() -> None:
    turns = (Turn("assistant", "Hello!"), Turn("user", "Why?"), Turn("assistant", "So."))
    sample = tokenize(Conversation(turns, ""))
    assert supervised_text(sample, make_tokenizer()) == ["Hello!<|im_end|>", "So.<|im_end|>"]


def test_turns_after_the_last_assistant_turn_are_left_out() -> None:
    longer = Conversation((*CHAT.turns, Turn("user", "And?")), "")
    assert tokenize(longer).input_ids.tolist() == tokenize(CHAT).input_ids.tolist()


def test_chat_without_an_assistant_cannot_train() -> None:
    assert not tokenize(Conversation((Turn("user", "Hello"),), "")).can_train


def test_text_is_supervised_after_the_first_tokens() -> None:
    rules = TokenRules(max_seq_len=1000, skip_first_tokens=3, vocab_size=VOCAB_SIZE)
    sample = tokenize(Conversation((), "Hello there, how are you?"), None, rules)
    assert sample.input_ids.tolist() == make_tokenizer()("Hello there, how are you?")["input_ids"]
    assert sample.loss_mask.tolist() == [False] * 3 + [True] * (len(sample.input_ids) - 3)


def test_long_sample_is_cut_and_says_by_how_much() -> None:
    whole = tokenize(CHAT)
    cut = tokenize(CHAT, CHATML, TokenRules(max_seq_len=10, skip_first_tokens=1, vocab_size=VOCAB_SIZE))
    assert cut.input_ids.tolist() == whole.input_ids[:10].tolist()
    assert cut.loss_mask.tolist() == whole.loss_mask[:10].tolist()
    assert cut.num_cut == len(whole.input_ids) - 10 and whole.num_cut == 0
    assert whole.can_train and not cut.can_train  # the first ten tokens are the system's


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (SHOUTING, "does not give back the assistant's turns"),
        (COUNTING, "renders the prompt of turn 2 differently"),
        (REFUSING, "the chat template refuses the conversation: roles must alternate"),
        (CHATML_WITH_TAG.replace("'assistant' %}{% gen", "'nobody' %}{% gen"), "block marks no token"),
    ],
)
def test_template_that_cannot_be_followed_is_refused(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenize(CHAT, template)


def test_chat_without_a_template_is_refused_and_text_is_not() -> None:
    with pytest.raises(VerifierError, match="no chat template"):
        tokenize(CHAT, None)
    assert tokenize(Conversation((), "Hello there"), None).can_train


def test_id_outside_the_verifiers_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match=r"the tokenizer gives id \d+, the verifier's vocabulary is 0\.\.9"):
        tokenize(CHAT, CHATML, TokenRules(max_seq_len=1000, skip_first_tokens=1, vocab_size=10))


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(VerifierError, match="no tokenizer can be read"):
        load_tokenizer(str(tmp_path), trust_remote_code=False)


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "id": 7},
        {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "weight": 1}]},
        {"messages": [{"from": "user", "value": "Hi"}, {"from": "chatgpt", "value": "Ho"}]},
    ],
)
def test_all_forms_of_a_chat_are_one_conversation(record: dict[str, Any]) -> None:
    expected = Conversation((Turn("user", "Hi"), Turn("assistant", "Ho")), "")
    assert parse_conversation(json.dumps(record).encode()) == expected


def test_plain_text_is_taken_as_it_stands() -> None:
    assert parse_conversation('{"text": " Grüße\\n"}'.encode()) == Conversation((), " Grüße\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json", "not JSON (Expecting property name"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[1, 2]", "expected a JSON object, found a list"),
        (b'{"prompt": "x"}', "expected exactly one of the keys conversations, messages, text; found keys ['prompt']"),
        (b'{"text": "x", "messages": []}', "found messages and text"),
        (b'{"text": null}', "text is a null, expected a string"),
        (b'{"text": " \\n"}', "text is empty"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b'{"messages": []}', "messages is empty, expected a list of turns"),
        (b'{"messages": "hi"}', "messages is a string, expected a list of turns"),
        (b'{"messages": [{"role": "user"}]}', "turn 0 has neither role and content nor from and value"),
        (b'{"messages": [3]}', "turn 0 has neither role and content nor from and value"),
        (b'{"messages": [{"role": "narrator", "content": "x"}]}', "turn 0 has the unknown role 'narrator'"),
        (b'{"messages": [{"role": "user", "content": ""}]}', "turn 0: content is empty"),
        (b'{"conversations": [{"from": "human", "value": ["x"]}]}', "turn 0: value is a list, expected a string"),
    ],
)
def test_bad_line_is_refused_with_its_problem(line: bytes, message: str) -> None:
    with pytest.raises(DataError) as error:
        parse_conversation(line)
    assert message in str(error.value)


def test_all_problems_of_a_line_are_told_at_once() -> None:
    turns = [{"role": "narrator", "content": "x"}, {"role": "user", "content": ""}, {"role": "user"}]
    with pytest.raises(DataError) as error:
        parse_conversation(json.dumps({"messages": turns}).encode())
    assert [f"turn {number}" in str(error.value) for number in range(3)] == [True] * 3


def test_chunks_hold_every_line_once_with_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "LINES_PER_CHUNK", 4)
    monkeypatch.setattr(conversations, "CHUNK_BYTES", 60)
    # Blank lines, \r\n, a separator that is no line end in JSONL, a line above a chunk's bytes, no \n at the end.
    lines = ["a", "", "b\r", "\u2028c", "d" * 70, "  ", "e", "f", "g", "h"]
    path = tmp_path / "c.jsonl"
    path.write_bytes("\n".join(lines).encode())
    chunks, digest = index_lines(path)
    found = [item for chunk in chunks for item in iter_lines(path, chunk)]
    assert found == [(number, line.encode()) for number, line in enumerate(lines, 1) if line.strip()]
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(chunks) > 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("folder", "is a folder, expected a file"), (b"", "no lines"), (b"\n \n", "no lines")],
)
def test_file_without_lines_is_refused(tmp_path: Path, content: bytes | str | None, message: str) -> None:
    path = tmp_path / "c.jsonl"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    with pytest.raises(DataError, match=message):
        index_lines(path)
