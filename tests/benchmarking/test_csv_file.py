"""The table of measurements: one header, rows with different columns, several writers at once."""

import csv
import multiprocessing
import re

import pytest

from unite_fast.benchmarking import csv_file
from unite_fast.benchmarking.plot import RATES, draw
from unite_fast.errors import UserError


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_with_different_columns(tmp_path):
    path = tmp_path / "new" / "bench.csv"
    csv_file.append(path, {"recipe": "a, b", "images_per_s": 1.5})
    csv_file.append(path, {"images_per_s": 2.5, "recipe": 'say "c"', "mfu": None})
    csv_file.append(path, {"recipe": "d"})
    assert rows(path) == [
        {"recipe": "a, b", "images_per_s": "1.5", "mfu": ""},
        {"recipe": 'say "c"', "images_per_s": "2.5", "mfu": ""},
        {"recipe": "d", "images_per_s": "", "mfu": ""},
    ]
    assert path.read_text().splitlines()[0] == "recipe,images_per_s,mfu"
    assert csv_file.read(path) == rows(path)
    assert {file.name for file in path.parent.iterdir()} == {"bench.csv", ".bench.csv.lock"}


def column(writer, number):
    """Every other row has its own column, for which the table is rewritten."""
    return f"column_{writer}_{number}" if number % 2 else "column"


def write(path, writer, count, barrier):
    barrier.wait()
    for number in range(count):
        csv_file.append(path, {"images_per_s": number, column(writer, number): "x" * 3000, "writer": writer})


def test_several_processes_write_at_once(tmp_path):
    path, fork = tmp_path / "bench.csv", multiprocessing.get_context("fork")
    barrier = fork.Barrier(4)
    writers = [fork.Process(target=write, args=(path, writer, 20, barrier)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    written = rows(path)
    assert sorted((row["writer"], int(row["images_per_s"])) for row in written) == [
        (str(writer), number) for writer in range(4) for number in range(20)
    ]
    assert all(row[column(row["writer"], int(row["images_per_s"]))] == "x" * 3000 for row in written)


def test_invalid_tables_are_refused(tmp_path, mentions):
    path = tmp_path / "notes.csv"
    path.write_text("day,weather\nmonday,rain\n")
    with pytest.raises(UserError, match=mentions(path, "--csv")):
        csv_file.append(path, {"images_per_s": 1})
    assert path.read_text() == "day,weather\nmonday,rain\n"
    with pytest.raises(UserError, match=mentions(tmp_path)):
        csv_file.append(tmp_path, {"images_per_s": 1})
    with pytest.raises(UserError, match=mentions(tmp_path / "none.csv", "--csv")):
        csv_file.read(tmp_path / "none.csv")


def test_a_row_after_a_cut_one_begins_a_line_and_no_link_is_followed(tmp_path):
    path = tmp_path / "bench.csv"
    csv_file.append(path, {"recipe": "a", "images_per_s": 1})
    path.write_text(path.read_text().rstrip("\n"))
    csv_file.append(path, {"recipe": "b", "images_per_s": 2})
    assert [row["recipe"] for row in rows(path)] == ["a", "b"]
    (tmp_path / "link.csv").symlink_to("bench.csv")
    with pytest.raises(UserError, match=r"link\.csv"):
        csv_file.append(tmp_path / "link.csv", {"recipe": "c", "images_per_s": 3})
    assert len(rows(path)) == 2


COLUMNS = [*csv_file.WORDS, *RATES]
GOOD = "digits,CPU,1,2026-01-01,abc,3.5,3,4"


@pytest.mark.parametrize(
    "content",
    [
        b"images_per_s\n\xff\xfe\n",
        b"images_per_s\n" + b"x" * 200_000,
        b"images_per_s,a,images_per_s\n1,2,3\n",
        b"images_per_s\n1,2\n",
        b"day,weather\n",
    ],
    ids=["bytes", "a long cell", "a column twice", "more cells than columns", "another table"],
)
def test_what_is_no_table_is_named_and_kept(content, tmp_path, mentions):
    path = tmp_path / "bench.csv"
    path.write_bytes(content)
    for act in (
        lambda: csv_file.append(path, {"images_per_s": 1, "new": 2}),
        lambda: csv_file.measurements(path, RATES),
    ):
        with pytest.raises(UserError, match=mentions(path)):
            act()
    assert path.read_bytes() == content


def test_a_measurement_without_its_numbers_is_left_out_and_counted(tmp_path, mentions):
    path = tmp_path / "bench.csv"
    cells = ["abc", "nan", "inf", "1e400", "-1", "0", ""]
    bad = [GOOD, *(f"{GOOD.rpartition(',')[0]},{cell}" for cell in cells), "digits", "digits,CPU,1,2026"]
    path.write_text("\n".join([",".join(COLUMNS), *bad, GOOD.replace("abc", "\x1b[31m")]) + "\n")
    kept, left_out = csv_file.measurements(path, RATES)
    assert [row["commit"] for row in kept] == ["abc", r"\x1b[31m"]
    assert re.search(mentions(9, 11, path, "row 2"), left_out)
    assert csv_file.measurements(path, RATES)[0] == kept
    path.write_text("recipe,images_per_s\na,1\n")
    kept, left_out = csv_file.measurements(path, RATES)
    assert not kept
    assert re.search(mentions(1, 1, path), left_out)


def test_names_in_the_plot_are_not_formulas(tmp_path):
    path = tmp_path / "bench.csv"
    path.write_text(f"{','.join(COLUMNS)}\n{GOOD.replace('digits', '$x_$').replace('abc', '$')}\n")
    assert draw(path, tmp_path / "plot.png") == (1, "")
