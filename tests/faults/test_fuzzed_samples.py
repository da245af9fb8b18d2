"""Sample files damaged in every way, read by a process that may die of them: a sample, or a reason why it is none.

The process (`sample_reader`) holds what it reads against what a sample must be. Whatever a file holds, nothing else may
happen: no other exception, no crash, no memory without bound, no code run. The cases are the same each time.
"""

import functools
import io
import json
import os
import pickletools
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.faults.sample_reader import MEMORY_BYTES
from tests.makers import HIDDEN_SIZE, NUM_AUX_LAYERS, make_content, saved_bytes, write_sample

ROOT = Path(__file__).parents[2]
NUM_TOKENS = 20
WHOLE = {version: saved_bytes(make_content(NUM_TOKENS, version)) for version in (0, 1)}
# Sizes, offsets and counts that overflow something, or claim more than there is.
NUMBERS = [0, 1, 2, 16, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1]
FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)

versions = st.sampled_from([0, 1])


class Reader:
    """The process, started anew after a file that it died of."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "case.pt"
        self._good = write_sample(folder / "good.pt")
        self._process: subprocess.Popen[str] | None = None
        self.verdicts: Counter[str] = Counter()

    def read(self, content: bytes, version: int) -> str:
        """Return the verdict on a file; fail if the reader does anything but give one."""
        self._path.write_bytes(content)
        process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"path": str(self._path), "version": version}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            self._process = None
            raise AssertionError(f"the process that read the file died of it: exit status {process.wait()}")
        answer = json.loads(line)
        assert answer["fault"] is None, answer["fault"]
        self.verdicts[answer["verdict"]] += 1
        verdict: str = answer["verdict"]
        return verdict

    def _start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "tests.faults.sample_reader", str(self._good)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """One process for all files of the module."""
    reader = Reader(tmp_path_factory.mktemp("fuzz"))
    yield reader
    reader.close()


@pytest.fixture
def reader(process: Reader) -> Reader:
    """That process, with its verdicts counted from here on."""
    process.verdicts.clear()
    return process


# ------------------------------------------------------------------------------------- any bytes


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """One to four flips, cuts, copies and overwritings of ranges, at any place of a file."""
    place = st.integers(0, 2**16)
    single = st.one_of(
        st.tuples(st.just("flip"), place, st.integers(0, 7), st.just(0)),
        st.tuples(st.just("cut"), place, st.just(0), st.just(0)),
        st.tuples(st.just("remove"), place, st.integers(1, 600), st.just(0)),
        st.tuples(st.just("copy"), place, st.integers(1, 600), place),
        st.tuples(st.just("insert"), place, st.integers(1, 64), place),
        st.tuples(st.just("number"), place, st.sampled_from([1, 2, 4, 8]), st.sampled_from(NUMBERS)),
    )
    steps = draw(st.lists(single, min_size=1, max_size=4))

    def damage(content: bytes) -> bytes:
        changed = bytearray(content)
        for kind, where, size, value in steps:
            if changed:
                apply_damage(changed, kind, where % len(changed), size, value)
        return bytes(changed)

    return damage


def apply_damage(changed: bytearray, kind: str, place: int, size: int, value: int) -> None:
    """Do one of `damages` in place."""
    if kind == "flip":
        changed[place] ^= 1 << size
    elif kind == "cut":
        del changed[place:]
    elif kind == "remove":
        del changed[place : place + size]
    elif kind in ("copy", "insert"):
        target = value % len(changed)
        changed[target : target + (size if kind == "copy" else 0)] = changed[place : place + size]
    else:
        changed[place : place + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")


@settings(FUZZ, max_examples=1500)
@given(versions, damages())
def test_files_damaged_anywhere_are_samples_or_refused(reader: Reader, version: int, damage: Any) -> None:
    reader.read(damage(WHOLE[version]), version)


# ------------------------------------------------------------------------------------- the zip


def find_zip_fields(content: bytes) -> list[tuple[int, int]]:
    """Return (place, bytes) of every number in the zip's headers: of each entry, of the directory, of its end."""
    local = struct.Struct("<HHHHHIIIHH")
    central = struct.Struct("<HHHHHHIIIHHHHHII")
    end, end_64, locator = struct.Struct("<HHHHIIH"), struct.Struct("<QHHIIQQQQ"), struct.Struct("<IQI")
    signatures = {b"PK\3\4": local, b"PK\1\2": central, b"PK\5\6": end, b"PK\6\6": end_64, b"PK\6\7": locator}
    sizes = {"H": 2, "I": 4, "Q": 8}
    fields = []
    for signature, layout in signatures.items():
        place = content.find(signature)
        while place >= 0:
            start = place + 4
            for code in layout.format[1:]:
                fields.append((start, sizes[code]))
                start += sizes[code]
            place = content.find(signature, place + 4)
    return [field for field in fields if sum(field) <= len(content)]


ZIP_FIELDS = {version: find_zip_fields(content) for version, content in WHOLE.items()}


@settings(FUZZ, max_examples=1200)
@given(versions, st.lists(st.tuples(st.integers(0, 10**4), st.sampled_from(NUMBERS)), min_size=1, max_size=3))
def test_files_whose_zip_lies_are_samples_or_refused(
    reader: Reader, version: int, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(WHOLE[version])
    for which, number in changes:
        place, size = ZIP_FIELDS[version][which % len(ZIP_FIELDS[version])]
        content[place : place + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
    reader.read(bytes(content), version)


# ------------------------------------------------------------------------------------- the pickle


def read_entries(content: bytes) -> dict[str, bytes]:
    """The zip's entries by name."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zip_entries(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A whole zip of these."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


ENTRIES = {version: read_entries(content) for version, content in WHOLE.items()}
PICKLE = "archive/data.pkl"
OPCODES = {
    version: [place or 0 for _, _, place in pickletools.genops(entries[PICKLE])] for version, entries in ENTRIES.items()
}
ALL_OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
INTEGERS = [
    b"K\0", b"K\1", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f",
    b"\x8a\x05\xff\xff\xff\xff\0", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8a\x09" + b"\0" * 8 + b"\1",
    b"\x88", b"\x89", b"N", b"X\1\0\0\0a", b")", b"]",
]  # fmt: skip


@st.composite
def pickle_changes(draw: st.DrawFn) -> list[tuple[int, str, bytes]]:
    """Opcodes replaced by others, with or without their arguments, or by numbers; removed, doubled, swapped."""
    single = st.one_of(
        st.tuples(st.integers(0, 10**4), st.just("opcode"), st.sampled_from(ALL_OPCODES)),
        st.tuples(st.integers(0, 10**4), st.just("whole"), st.sampled_from(INTEGERS)),
        st.tuples(st.integers(0, 10**4), st.just("whole"), st.binary(max_size=6)),
        st.tuples(st.integers(0, 10**4), st.sampled_from(["double", "swap"]), st.just(b"")),
        st.tuples(st.integers(0, 10**4), st.just("flip"), st.binary(min_size=2, max_size=2)),
    )
    return draw(st.lists(single, min_size=1, max_size=3))


def change_pickle(content: bytes, places: list[int], changes: list[tuple[int, str, bytes]]) -> bytes:
    """Apply `pickle_changes` to the opcodes at these places."""
    pieces = [content[start:end] for start, end in zip(places, [*places[1:], len(content)], strict=True)]
    for which, kind, value in changes:
        number = which % len(pieces)
        if kind == "opcode":
            pieces[number] = value + pieces[number][1:]
        elif kind == "whole":
            pieces[number] = value
        elif kind == "double":
            pieces[number] += pieces[number]
        elif kind == "swap":
            pieces[number], pieces[number - 1] = pieces[number - 1], pieces[number]
        elif pieces[number]:
            piece = bytearray(pieces[number])
            piece[value[0] % len(piece)] ^= 1 << (value[1] % 8)
            pieces[number] = bytes(piece)
    return b"".join(pieces)


@settings(FUZZ, max_examples=2000)
@given(versions, pickle_changes())
def test_files_whose_pickle_is_another_are_samples_or_refused(
    reader: Reader, version: int, changes: list[tuple[int, str, bytes]]
) -> None:
    entries = ENTRIES[version]
    changed = change_pickle(entries[PICKLE], OPCODES[version], changes)
    reader.read(zip_entries(entries | {PICKLE: changed}), version)


def test_each_opcode_of_the_pickle_made_another_is_a_sample_or_refused(reader: Reader) -> None:
    for number in range(len(OPCODES[1])):
        for value in INTEGERS[::2]:
            changed = change_pickle(ENTRIES[1][PICKLE], OPCODES[1], [(number, "whole", value)])
            reader.read(zip_entries(ENTRIES[1] | {PICKLE: changed}), 1)
    assert reader.verdicts["good"] > 20 and reader.verdicts["cut short or damaged"] > 200


# ------------------------------------------------------------------------------------- what no accident makes


class Call:
    """Pickled as a call, which loading makes."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


class WithState:
    """A Python object, with code of its own that loading would run."""

    def __setstate__(self, state: object) -> None:
        Path("state-was-set").touch()

    def __getstate__(self) -> object:
        return {"path": "state-was-set"}


CALLS: dict[str, Callable[[], Any]] = {
    "os.system": lambda: Call(os.system, "touch code-was-run"),
    "eval": lambda: Call(eval, "__import__('os').system('touch code-was-run')"),
    "exec": lambda: Call(exec, "open('code-was-run', 'w')"),
    "open": lambda: Call(open, "code-was-run", "w"),
    "subprocess": lambda: Call(subprocess.call, ["touch", "code-was-run"]),
    "getattr": lambda: Call(getattr, "text", "upper"),
    "torch.load": lambda: Call(torch.load, "code-was-run"),
    "object": WithState,
}


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("where", ["input_ids", "last state", "key", "beside"])
@pytest.mark.parametrize("name", CALLS)
def test_no_code_in_a_file_is_run(reader: Reader, name: str, where: str, version: int) -> None:
    content: dict[Any, Any] = make_content(NUM_TOKENS, version)
    if where == "last state" and version == 1:
        content["hidden_states"][-1] = CALLS[name]()
    elif where == "key":
        content[CALLS[name]()] = 1
    else:
        content[{"input_ids": "input_ids", "last state": "target"}.get(where, "more")] = CALLS[name]()
    assert reader.read(saved_bytes(content), version) in ("holds Python objects", "cut short or damaged")


def test_code_in_a_copied_file_that_is_loaded_without_care_would_run(tmp_path: Path) -> None:
    """The oracle of the test above: its files do hold code."""
    path = tmp_path / "code-was-run"
    torch.load(io.BytesIO(saved_bytes({"input_ids": Call(os.system, f"touch {path}")})), weights_only=False)
    assert path.exists()


def _claiming(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor of one stored value."""
    return torch.zeros(1, dtype=dtype).as_strided(shape, [0] * len(shape))


def _ids_of(dtype: torch.dtype) -> dict[str, Any]:
    return {"input_ids": torch.full((NUM_TOKENS,), 3).to(dtype)}


def _states_of(dtype: torch.dtype) -> dict[str, Any]:
    return {"hidden_states": [torch.randn(NUM_TOKENS, HIDDEN_SIZE).to(dtype) for _ in range(NUM_AUX_LAYERS + 1)]}


def _cyclic() -> list[Any]:
    states: list[Any] = []
    states.append(states)
    return states * (NUM_AUX_LAYERS + 1)


def _deep() -> list[Any]:
    nested: list[Any] = []
    for _ in range(300):
        nested = [nested]
    return nested


def _laughing() -> list[Any]:
    """A list of 2**60 tensors, of 60 lists."""
    nested: list[Any] = [torch.zeros(1)]
    for _ in range(60):
        nested = [nested, nested]
    return nested


HUGE = MEMORY_BYTES * 2
ODD: dict[str, Callable[[], dict[str, Any]]] = {
    "ids of a terabyte": lambda: {"input_ids": _claiming(2**37, dtype=torch.int64)},
    "ids and mask of a terabyte": lambda: {
        "input_ids": _claiming(2**37, dtype=torch.int64),
        "loss_mask": _claiming(2**37, dtype=torch.int64),
    },
    "all of a terabyte": lambda: {
        "input_ids": _claiming(2**36, dtype=torch.int64),
        "loss_mask": _claiming(2**36, dtype=torch.bool),
        "hidden_states": [_claiming(2**36, HIDDEN_SIZE)] * (NUM_AUX_LAYERS + 1),
    },
    "a state of a terabyte": lambda: {"hidden_states": [_claiming(2**36, HIDDEN_SIZE)] * (NUM_AUX_LAYERS + 1)},
    "bytearray": lambda: {"input_ids": Call(bytearray, HUGE)},
    "tensor without bytes": lambda: {"input_ids": torch.zeros(20, dtype=torch.int64, device="meta")},
    "state without bytes": lambda: {"hidden_states": [torch.zeros(20, 16, device="meta")] * 4},
    "sparse ids": lambda: {"input_ids": torch.zeros(20, dtype=torch.int64).to_sparse()},
    "sparse state": lambda: {"hidden_states": [torch.ones(20, HIDDEN_SIZE).to_sparse()] * 4},
    "sparse rows": lambda: {"hidden_states": [torch.ones(20, HIDDEN_SIZE).to_sparse_csr()] * 4},
    "quantised": lambda: {"input_ids": torch.quantize_per_tensor(torch.ones(20), 1.0, 0, torch.qint8)},
    "conjugate": lambda: {"hidden_states": [torch.ones(20, HIDDEN_SIZE, dtype=torch.complex64).conj()] * 4},
    "negative view": lambda: {"hidden_states": [torch._neg_view(torch.ones(20, HIDDEN_SIZE))] * 4},
    "with gradient": lambda: {"hidden_states": [torch.randn(20, HIDDEN_SIZE, requires_grad=True) for _ in range(4)]},
    "parameters": lambda: {"hidden_states": [torch.nn.Parameter(torch.randn(20, HIDDEN_SIZE)) for _ in range(4)]},
    "cyclic": lambda: {"hidden_states": _cyclic()},
    "deep": lambda: {"hidden_states": _deep()},
    "laughing": lambda: {"hidden_states": _laughing()},
    "half a letter": lambda: {"\ud800": 1},
    "thousand keys": lambda: {f"layer.{number}.weight": torch.zeros(1) for number in range(1000)},
    "long key": lambda: {"k" * 100_000: 1},
    "nested": lambda: {"hidden_states": [torch.nested.nested_tensor([torch.ones(3), torch.ones(4)])] * 4},
    **{
        f"ids of {dtype}": functools.partial(_ids_of, dtype)
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64, torch.complex64)
    },
    **{
        f"states of {dtype}": functools.partial(_states_of, dtype)
        for dtype in (torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.int32)
    },
}
GOOD = {"with gradient", "parameters", "ids of torch.uint8", "ids of torch.int8", "ids of torch.int16",
        "states of torch.float64"}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore")
def test_odd_tensors_are_refused_unless_their_values_are_those_of_a_sample(reader: Reader, name: str) -> None:
    verdict = reader.read(saved_bytes(make_content(NUM_TOKENS) | ODD[name]()), 1)
    assert (verdict == "good") == (name in GOOD), verdict


def test_a_mask_that_is_one_value_for_all_tokens_is_read(reader: Reader) -> None:
    mask = torch.ones(1, dtype=torch.int64).expand(NUM_TOKENS)
    assert reader.read(saved_bytes(make_content(NUM_TOKENS) | {"loss_mask": mask}), 1) == "good"


@pytest.mark.parametrize("entry", [PICKLE, "archive/data/0", "archive/byteorder"])
def test_a_small_entry_that_unpacks_to_a_large_one_is_not_unpacked(reader: Reader, entry: str) -> None:
    entries = dict(ENTRIES[1])
    entries[entry] += b"\0" * HUGE
    content = zip_entries(entries, zipfile.ZIP_DEFLATED)
    assert len(content) < HUGE // 500
    assert reader.read(content, 1) == "compressed"


def test_a_sample_that_was_zipped_again_is_not_taken_for_values(reader: Reader) -> None:
    assert reader.read(zip_entries(ENTRIES[1], zipfile.ZIP_STORED), 1) == "good"
    assert reader.read(zip_entries(ENTRIES[1], zipfile.ZIP_DEFLATED), 1) == "compressed"


@pytest.mark.parametrize("entry", [PICKLE, "archive/data/0", "archive/.data/serialization_id"])
def test_an_entry_that_calls_itself_a_folder_is_never_read_as_whatever_the_memory_holds(
    reader: Reader, entry: str
) -> None:
    content = bytearray(WHOLE[1])
    header = content.rfind(b"PK\x01\x02", 0, content.rfind(entry.encode()))
    attributes = int.from_bytes(content[header + 38 : header + 42], "little")
    content[header + 38 : header + 42] = (attributes | 0x10).to_bytes(4, "little")
    assert [reader.read(bytes(content), 1) for _ in range(20)] == ["cut short or damaged"] * 20
