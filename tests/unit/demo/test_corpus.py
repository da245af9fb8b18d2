import sysconfig
from pathlib import Path

import pytest

from eagle3_ray.demo import corpus
from eagle3_ray.demo.corpus import (
    CONTINUATION_CHARS,
    PROMPT_CHARS,
    Corpus,
    build_corpus,
    cut_at_line_ends,
    cut_into_passages,
    drop_repeated_paragraphs,
    read_documents,
)
from eagle3_ray.errors import DataError


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return read_documents()


@pytest.fixture(scope="module")
def split(documents: list[str]) -> Corpus:
    return build_corpus(documents, seed=0)


def test_this_python_has_enough_text_for_training_and_for_prompts(split: Corpus) -> None:
    assert len(split.train) > 1000
    assert len(split.held_out) > 150
    assert len(split.prompts) > 640


def test_documents_come_in_the_same_order_every_time(documents: list[str]) -> None:
    assert read_documents() == documents


def test_same_seed_gives_the_same_corpus_and_another_seed_another_split(documents: list[str], split: Corpus) -> None:
    assert build_corpus(documents, seed=0) == split
    assert build_corpus(documents, seed=1).held_out != split.held_out


def test_no_paragraph_of_held_out_passages_or_prompts_was_trained_on(split: Corpus) -> None:
    def paragraphs_of(text: str) -> set[str]:
        return {" ".join(part.split()) for part in text.split("\n\n")}

    trained = paragraphs_of("".join(p.prompt + p.continuation for p in split.train))
    held_out = "".join(p.prompt + p.continuation for p in split.held_out)
    for text in (held_out, "".join(split.prompts)):
        # Pieces that a cut left over may be common short lines; whole paragraphs may not come back.
        assert {part for part in paragraphs_of(text) & trained if len(part) > 80} == set()


def test_prompts_are_different_texts_of_the_length_asked_for(split: Corpus) -> None:
    assert len(set(split.prompts)) == len(split.prompts)
    assert min(map(len, split.prompts)) >= PROMPT_CHARS


def test_paragraph_is_kept_where_it_comes_first_whatever_its_line_breaks() -> None:
    first = "a common\nparagraph of some length " + "x" * 160
    second = "something of its own " + "y" * 160 + "\n\na common paragraph   of some length " + "x" * 160
    assert drop_repeated_paragraphs([first, second]) == [first, "something of its own " + "y" * 160]


def test_document_of_which_too_little_is_left_is_dropped() -> None:
    assert drop_repeated_paragraphs(["z" * 200, "z" * 200 + "\n\nshort"]) == ["z" * 200]


def test_parts_are_whole_lines_of_at_least_the_length_asked_for() -> None:
    text = "12345\n123\n1234567\n12\n1\n"
    assert cut_at_line_ends(text, [6]) == ["12345\n", "123\n1234567\n"]
    assert cut_at_line_ends(text, [4, 8]) == ["12345\n", "123\n1234567\n", "12\n1\n"]


def test_passages_are_consecutive_and_lose_only_the_rest() -> None:
    text = "".join(f"line {number} of a text\n" for number in range(100))
    passages = cut_into_passages(text)
    joined = "".join(p.prompt + p.continuation for p in passages)
    assert text.startswith(joined) and len(text) - len(joined) < PROMPT_CHARS + CONTINUATION_CHARS + 50
    assert all(len(p.prompt) >= PROMPT_CHARS and len(p.continuation) >= CONTINUATION_CHARS for p in passages)


def test_python_without_its_sources_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(corpus, "_read_topics", lambda: ["only little"])
    with pytest.raises(DataError) as caught:
        read_documents()
    assert str(tmp_path) in str(caught.value)
    assert "have 11 characters, expected at least 300,000" in str(caught.value)
    assert "use a complete one" in str(caught.value)
