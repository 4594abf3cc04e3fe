"""Outputs that a run can do without: one warning each."""

import pytest

from unite_fast.training.side_outputs import SideOutputs


def test_a_failure_is_one_warning_per_output():
    said = []
    sides = SideOutputs(said.append)
    for name in ("pictures", "pictures", "metrics"):
        with sides.attempt(name):
            raise OSError("disk\nfull")
    with sides.attempt("events"):
        raise MemoryError
    assert said == [f"warning: {part}; the run goes on without it" for part in
                    ("pictures: disk full", "metrics: disk full", "events: MemoryError")]  # fmt: skip


def test_signals_are_not_caught():
    with pytest.raises(KeyboardInterrupt), SideOutputs().attempt("pictures"):
        raise KeyboardInterrupt


def test_an_error_of_the_system_is_named_without_its_number():
    said = []
    for name in ("run/samples", b"run/samples", 7, None):
        with SideOutputs(said.append).attempt(f"picture {name}"):
            raise OSError(17, "in the way", name)
    assert [line.split(": ", 2)[2] for line in said] == [
        f"{name}in the way; the run goes on without it" for name in ("run/samples: ", "run/samples: ", "7: ", "")
    ]
