"""Conversation -> token ids and loss mask: supervised is what the assistant says, and nothing else.

A chat is rendered by the tokenizer's chat template. If the template marks the assistant's text with
`{% generation %}`, that decides. Otherwise the rendered text is cut by rendering the conversation again:

    <s><|user|>Hi<|assistant|>Hello.<|end|><|user|>Why?<|assistant|>Because.<|end|>
                              ------------                          --------------    supervised
                             ^ length of the rendering of the turns before, with the generation prompt
                                    ^ where a marker behind the turn's text comes out

The end-of-turn token, if the tokenizer knows it as special, is supervised with the text: the draft must learn to
stop. A token that reaches over an edge (a merge of header and text) is not. If the renderings do not agree, the
conversation is refused: a mask that is off by one turn trains without any visible error.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eagle3_ray.errors import DataError, VerifierError
from eagle3_ray.generation.conversations import Conversation
from eagle3_ray.generation.verifier_copy import local_verifier

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
START, END = "\ue000eagle3-ray-start\ue001", "\ue000eagle3-ray-end\ue001"  # private-use characters: in no real text
MARKER = re.compile(f"{START}|{END}")

Message = dict[str, str]
Span = tuple[int, int]


@dataclass(frozen=True)
class TokenRules:
    """What becomes of a conversation.

    Attributes:
        max_seq_len: tokens a sample is cut at.
        skip_first_tokens: leading tokens of plain text that are not supervised.
        vocab_size: W; an id outside [0, W) is refused.
    """

    max_seq_len: int
    skip_first_tokens: int
    vocab_size: int


@dataclass(frozen=True)
class TokenizedSample:
    """Ids and mask of one conversation of S tokens.

    Attributes:
        input_ids: [S] int64, in [0, W).
        loss_mask: [S] bool, True where the token is supervised.
        num_cut: tokens beyond `max_seq_len` that were cut off.
    """

    input_ids: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    num_cut: int

    @property
    def can_train(self) -> bool:
        """Whether a position is left that trains something: token 0 has no state before it."""
        return bool(self.loss_mask[1:].any())


def load_tokenizer(name_or_path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the verifier's tokenizer.

    Args:
        name_or_path: folder, local or a URL, or hub id.
        trust_remote_code: run Python code that comes with it.

    Raises:
        VerifierError: There is none, or it cannot be read.
    """
    try:
        folder = local_verifier(name_or_path, with_weights=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise VerifierError(
            f"{name_or_path}: no tokenizer can be read ({error}). Put the verifier's own tokenizer files "
            "beside its config.json."
        ) from error
    tokenizer.model_max_length = 2**40  # samples are cut by max_seq_len; else every long text draws a warning
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def tokenize_conversation(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, rules: TokenRules
) -> TokenizedSample:
    """Turn one conversation into ids and loss mask.

    Turns after the assistant's last one are left out, as nothing in them can be supervised.

    Args:
        conversation: turns or text.
        tokenizer: the verifier's.
        rules: where to cut, what to supervise.

    Returns:
        The sample; it may have no supervised token (`can_train`).

    Raises:
        DataError: The chat template refuses the conversation, its renderings do not agree, or an id lies outside
            the vocabulary. The text does not name the line.
        VerifierError: The tokenizer has no chat template, or none can be followed with it.
    """
    if conversation.turns:
        ids, mask = _tokenize_chat(conversation, tokenizer)
    else:
        ids = np.asarray(tokenizer(conversation.text)["input_ids"], np.int64)
        mask = np.arange(len(ids)) >= rules.skip_first_tokens
    if len(ids) and ids.max() >= rules.vocab_size:
        raise DataError(
            f"the tokenizer gives id {ids.max()}, the verifier's vocabulary is 0..{rules.vocab_size - 1}; "
            "use the tokenizer that belongs to the verifier"
        )
    num_cut = max(len(ids) - rules.max_seq_len, 0)
    return TokenizedSample(ids[: rules.max_seq_len], mask[: rules.max_seq_len], num_cut)


def _tokenize_chat(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return ids [S] int64 and mask [S] bool of a chat."""
    template = _chat_template(tokenizer)
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        return np.empty(0, np.int64), np.empty(0, np.bool_)
    if any(MARKER.search(message["content"]) for message in messages):
        raise DataError("a turn holds the characters that eagle3_ray marks turns with (U+E000, U+E001)")
    try:
        if GENERATION_TAG.search(template):
            return _mask_by_generation_tag(messages, tokenizer)
        return _mask_by_spans(messages, tokenizer)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template refuses the conversation: {error}") from error


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.is_fast:
        raise VerifierError(
            f"{tokenizer.name_or_path}: its tokenizer ({type(tokenizer).__name__}) cannot say which characters a token "
            "comes from, so the assistant's tokens cannot be found. Use one with a tokenizer.json, or plain text."
        )
    if not tokenizer.chat_template:
        raise VerifierError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template, so chats cannot be rendered as the "
            'verifier knows them. Add a chat_template.jinja to the folder, or give plain text ({"text": ...}).'
        )
    template: str = tokenizer.get_chat_template()
    return template


def _mask_by_generation_tag(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    tokens: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    mask = np.asarray(tokens["assistant_masks"], np.bool_)
    if not mask.any():
        raise DataError("the chat template's {% generation %} block marks no token, although the assistant speaks")
    return np.asarray(tokens["input_ids"], np.int64), mask


def _mask_by_spans(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    def render(some: list[Message], add_generation_prompt: bool) -> str:
        text = tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert isinstance(text, str)
        return text

    text = render(messages, False)
    spans = _find_assistant_spans(messages, text, render)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray(tokens["input_ids"], np.int64)
    starts, ends = np.asarray(tokens["offset_mapping"], np.int64).reshape(-1, 2).T
    is_end_of_turn = np.isin(ids, _special_ids(tokenizer))
    mask = np.zeros(len(ids), np.bool_)
    for start, end in spans:
        mask |= (starts >= start) & (ends <= end) & (ends > starts)
        after = int(np.searchsorted(starts, end))
        if after < len(ids) and is_end_of_turn[after] and not text[end : starts[after]].strip():
            mask[after] = True
    return ids, mask


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    added = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    return [*added, *tokenizer.all_special_ids]


def _find_assistant_spans(
    messages: list[Message], text: str, render: Callable[[list[Message], bool], str]
) -> list[Span]:
    """Return (first, one past the last) character in `text` of what the assistant says in each of its turns.

    A turn begins where its prompt ends. Templates without a generation prompt (Llama 2's), and a chat that the
    assistant opens, have no such place: there it begins with its own text.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = {number: render(messages[:number], True) for number in turns if number > 0}
    if prompts:
        first = min(prompts)
        if prompts[first] == render(messages[:first], False):
            prompts = {}
    disagreeing = [number for number, prompt in prompts.items() if not text.startswith(prompt)]
    if disagreeing:
        raise DataError(
            f"the chat template renders the prompt of turn {disagreeing[0]} differently once the turn is there, so the "
            "assistant's text cannot be found; use a template with {% generation %} blocks"
        )
    unprompted = [number not in prompts for number in turns]
    starts, ends = _find_markers(messages, text, unprompted, render)
    marked_starts = iter(starts)
    return [
        (next(marked_starts) if number not in prompts else len(prompts[number]), end)
        for number, end in zip(turns, ends, strict=True)
    ]


def _find_markers(
    messages: list[Message], text: str, unprompted: list[bool], render: Callable[[list[Message], bool], str]
) -> tuple[list[int], list[int]]:
    """Return where the texts of the unprompted turns begin, and where the texts of all assistant turns end."""
    for trim in (False, True):  # some templates trim a turn's text: then the blanks go outside the markers
        flags = iter(unprompted)
        marked_messages = [
            {**message, "content": _mark(message["content"], next(flags), trim)}
            if message["role"] == "assistant"
            else message
            for message in messages
        ]
        marked = render(marked_messages, False)
        starts: list[int] = []
        ends: list[int] = []
        removed = 0
        for marker in MARKER.finditer(marked):
            (starts if marker.group() == START else ends).append(marker.start() - removed)
            removed += len(marker.group())
        if MARKER.sub("", marked) == text and len(ends) == len(unprompted) and len(starts) == sum(unprompted):
            return starts, ends
    raise DataError(
        "the chat template does not give back the assistant's turns as they stand, so their ends cannot be found; "
        "use a template with {% generation %} blocks"
    )


def _mark(content: str, with_start: bool, trim: bool) -> str:
    inner = content.strip() if trim else content
    begin = content.index(inner)
    return f"{content[:begin]}{START if with_start else ''}{inner}{END}{content[begin + len(inner) :]}"
