"""`report`: what runs have logged, as one page and its pictures."""

from pathlib import Path

from eagle3_ray.console import say, warn
from eagle3_ray.errors import UsageError
from eagle3_ray.report.reading import RunRecord, read_runs
from eagle3_ray.report.tables import headline
from eagle3_ray.storage import write_atomically
from eagle3_ray.verbs import ReportSettings


def run(settings: ReportSettings) -> None:
    """Read some run folders, and write a page about them.

    Raises:
        UsageError: The page cannot be written where it shall be, or matplotlib is not there.
        DataError: A folder is no run, has logged nothing, or what it has logged is damaged.
        CheckpointError: A committed checkpoint has lost a part since.
        StorageError: An object store cannot be read.
    """
    check_output(settings.output_path)
    runs = read_runs([path.absolute() for path in settings.run_paths])
    for record in runs:
        for note in record.notes:
            warn(f"{record.path}: {note}", path=str(record.path))
    pictures = write_report(runs, settings.output_path)
    for record in runs:
        label, number, text = headline(record)
        say(f"{label}: {number} {text}", "run", path=str(record.path))
    page = settings.output_path
    say(f"wrote {page}, and {len(pictures)} pictures to {pictures[0].parent}", "report", path=str(page))


def check_output(path: Path) -> None:
    """Refuse a place where no page can be written, before anything is read.

    Raises:
        UsageError: It is a folder, or below a file.
    """
    if path.is_dir():
        raise UsageError(f"--output-path {path}: is a folder. Name a file, such as {path / 'report.html'}.")


def write_report(runs: list[RunRecord], path: Path) -> list[Path]:
    """Draw the runs, write the pictures and then the page, and return where the pictures are.

    Raises:
        UsageError: As in `run`.
    """
    try:
        from eagle3_ray.report.page import build_page
        from eagle3_ray.report.plots import draw_figures
    except ImportError as error:
        raise UsageError(
            f"report draws with matplotlib, which cannot be imported ({error}). Install it where the report is made "
            "(pip install matplotlib, or this project as eagle3-ray[report]); training does not need it."
        ) from error
    drawings = draw_figures(runs)
    folder = path.with_name(f"{path.stem}-plots")
    pictures = [folder / f"{drawing.spec.name}.png" for drawing in drawings]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture, drawing in zip(pictures, drawings, strict=True):
            write_atomically(picture, drawing.png)
        write_atomically(path, build_page(runs, drawings))
    except OSError as error:
        raise UsageError(f"--output-path {path}: cannot be written ({error.strerror}: {error.filename}).") from error
    return pictures
