"""`eagle3-ray report` as it is typed: what it writes, what it refuses, with which exit code."""

import re
import struct
import sys
from pathlib import Path

import pytest

from eagle3_ray.cli import main, read_settings
from eagle3_ray.verbs import ReportSettings
from tests.unit.report.folders import make_run


def test_runs_are_words_wherever_they_stand() -> None:
    settings = read_settings("report", ["--output-path", "page.html", "a", "s3://bucket/run"])
    assert isinstance(settings, ReportSettings)
    assert [str(path) for path in settings.run_paths] == ["a", "s3://bucket/run"]
    assert settings.output_path == Path("page.html")


def test_runs_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "report.yaml").write_text("run_paths: [a, b]\n")
    settings = read_settings("report", ["--config", str(tmp_path / "report.yaml")])
    assert isinstance(settings, ReportSettings) and settings.run_paths == (Path("a"), Path("b"))


def test_a_page_and_its_pictures_are_written_and_the_headline_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run")
    page = tmp_path / "new" / "page.html"
    assert main(["report", str(tmp_path / "run"), "--output-path", str(page)]) == 0
    assert capsys.readouterr().out == (
        "run: 1.96 expected tokens per verification: checkpoint 0 (step 4, epoch 1) is the best of 2; "
        f"1.00 before training\nwrote {page}, and 6 pictures to {tmp_path}/new/page-plots\n"
    )
    names = ["acceptance.png", "accuracy.png", "loss.png", "optimizer.png", "speed.png", "tokens.png"]
    pictures = sorted((tmp_path / "new" / "page-plots").iterdir())
    assert [path.name for path in pictures] == names
    for path in pictures:
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert width > 1000 and height > 300
    before = page.read_bytes()
    assert main(["report", str(tmp_path / "run"), "--output-path", str(page)]) == 0
    assert page.read_bytes() == before  # the same runs give the same page


def test_a_name_that_looks_like_markup_stays_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<script>&", run_name="<img src=x>")
    assert main(["report", str(run), "--output-path", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text and "<img" not in text
    assert "<h1>Training of &lt;script&gt;&amp;</h1>" in text and "&lt;img src=x&gt;" in text


def test_ids_of_the_figures_are_unique_and_every_reference_has_its_target(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, scale) for name, scale in (("one", 1.0), ("two", 1.5))]
    assert main(["report", *map(str, runs), "--output-path", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 100
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)
    assert "var(--run-1)" in text and "#0303" not in text and "#010101" not in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "RUN: is required, typed or in the file of --config"),
        (["run", "run"], "run: one run, named more than once; name it once"),
        (["run", "link", "other"], "run and link: one run, named more than once; name it once"),
        (["ftp://x/y"], "ftp://x/y: is a URL of a kind that is not known; expected s3:// or gs://"),
        (["run", "--output-path", "."], "--output-path .: is a folder. Name a file, such as report.html."),
        (
            ["run", "--output-path", "file/page.html"],
            "--output-path file/page.html: cannot be written (Not a",
        ),
        (["run", "--output-path", "/proc/page.html"], "--output-path /proc/page.html: cannot be written (No such"),
    ],
)
def test_mistakes_in_what_was_typed_end_with_2(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "file").write_text("")
    assert main(["report", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_is_no_run_ends_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--output-path", str(tmp_path / "page.html")]) == 3
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: is no run folder: it holds neither run.yaml")
    assert list(tmp_path.iterdir()) == []


def test_a_line_cut_short_is_told_and_stands_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = make_run(tmp_path / "run") / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-1])
    assert main(["report", str(tmp_path / "run"), "--output-path", str(tmp_path / "page.html")]) == 0
    told = "The last line of metrics.jsonl was cut short, as by a kill, and is left out."
    assert f"warning: {tmp_path / 'run'}: {told}\n" in capsys.readouterr().out
    assert f"<li>run: {told}</li>" in (tmp_path / "page.html").read_text()


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run")
    for name in ("matplotlib", "eagle3_ray.report.plots", "eagle3_ray.report.page"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what importlib takes as "not there"
    assert main(["report", str(tmp_path / "run"), "--output-path", str(tmp_path / "page.html")]) == 2
    assert "report draws with matplotlib, which cannot be imported" in capsys.readouterr().err
