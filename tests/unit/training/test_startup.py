"""The parts of the time until the first step: none lost between two processes, none negative."""

import time

import pytest

from eagle3_ray.training.startup import FirstStep, Laps, add_up, describe_startup


class Clock:
    """Stands in for the module `time`: tells these times one after the other."""

    def __init__(self, *times_s: float) -> None:
        self.time = iter(times_s).__next__


def test_parts_of_both_processes_add_up_to_the_time_between_first_and_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eagle3_ray.training.startup.time", Clock(101.0, 103.0))
    driver = Laps(began_s=100.0)
    driver.end("imports")
    driver.end("Ray")
    monkeypatch.setattr("eagle3_ray.training.startup.time", Clock(107.0, 108.0, 112.0))
    rank = Laps()
    rank.end("model")
    told = rank.first_step(wait_s=1.0)
    parts_s = add_up(driver, told)
    expected = {"imports": 1.0, "Ray": 2.0, "workers": 4.0, "model": 1.0, "first bin": 1.0, "first step": 3.0}
    assert parts_s == expected and list(parts_s) == list(expected)
    assert describe_startup(parts_s) == (
        "first step after 12.0 s: imports 1.0, Ray 2.0, workers 4.0, model 1.0, first bin 1.0, first step 3.0"
    )


def test_a_clock_that_is_behind_or_set_back_makes_no_negative_part() -> None:
    driver = Laps(began_s=time.time() + 1000)
    driver.end("imports")
    assert driver.parts_s == {"imports": 0.0}
    told = FirstStep(began_s=driver.ended_s - 5, parts_s={"model": 1.0})
    assert add_up(driver, told) == {"imports": 0.0, "workers": 0.0, "model": 1.0}
