"""Label files: lists, tables, Kaggle's csv, and what is refused."""

import pytest

from unite_fast.data_pipeline.shards.label_file import check_one_folder, read_label_file
from unite_fast.data_pipeline.splits import ClassesDiffer
from unite_fast.errors import UserError

NAMES = ["b.JPEG", "a.JPEG", "c.JPEG"]


def read(tmp_path, text, names=NAMES):
    path = tmp_path / "labels.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_label_file(path, names)


@pytest.mark.parametrize(
    "text",
    [
        "A\nB\nC\n",
        "\ufeffA\r\nB\r\nC\r\n\r\n",
        "ImageId,PredictionString\na,A 1 2 3 4 A 5 6 7 8\nc,C 0 0 1 1\nb,B 1 1 2 2\nd,D 1 1 2 2\n",
        "a.JPEG A\nc.JPEG C\nb.JPEG B",
        "file,class\nval/c.JPEG,C\nval/b.JPEG,B\nval/a.JPEG,A",
        "b\tB\na\tA\nc\tC\n",
        '"a","A"\n"b","B"\n"c","C"\n',
    ],
)
def test_each_image_gets_its_class(tmp_path, text):
    assert read(tmp_path, text) == ["B", "A", "C"]


def test_a_class_may_have_spaces_and_commas(tmp_path):
    assert read(tmp_path, "great white shark\ntench, Tinca tinca\nC\n") == [
        "tench, Tinca tinca",
        "great white shark",
        "C",
    ]
    assert read(tmp_path, 'a,great white shark\nb,"tench, Tinca tinca"\nc,C')[0] == "tench, Tinca tinca"


def test_a_list_of_numbers_is_a_list_if_the_images_are_numbers_too(tmp_path):
    assert read(tmp_path, "2\n1\n2\n", ["0.png", "1.png", "2.png"]) == ["2", "1", "2"]
    assert read(tmp_path, "2 1\n1 2\n0 1\n", ["0.png", "1.png", "2.png"]) == ["1", "2", "1"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("A\nB\n", (2, 3)),
        ("A\n\nB\nC\n", ("line 2",)),
        ("a,A\nb,B\n", ("c.JPEG", 1)),
        ("a,A\nb,B\nc,C\na,B\n", ("a", "A", "B")),
        (b"\xff\xfe\x00", ("labels.txt", "UTF-8")),
    ],
)
def test_an_image_without_a_class_is_refused(tmp_path, mentions, text, words):
    with pytest.raises(UserError, match=mentions(*words)):
        read(tmp_path, text)


@pytest.mark.parametrize(
    "row",
    [
        "b.JPG,{}",
        "x\\y.JPEG,{}",
        "{},b.JPEG",
        "b.JPEG;{}",
        "b.JPEG: {}",
        '{{"file": "b.jpg", "label": "{}"}}',
        "001,{}",
    ],
)
def test_a_table_that_is_not_understood_is_no_list_of_classes(tmp_path, mentions, row):
    text = "".join(row.format(value) + "\n" for value in "ABA")
    with pytest.raises(UserError, match=mentions("labels.txt", "IMAGE,CLASS")):
        read(tmp_path, text)


@pytest.mark.parametrize("row", ["b;{}", "b: {}", "'b'|{}"])
def test_an_image_without_its_extension_before_another_separator_is_no_class(tmp_path, mentions, row):
    text = f"x\n{row.format('A')}\ny\n"
    with pytest.raises(UserError, match=mentions("labels.txt", "IMAGE,CLASS")):
        read(tmp_path, text)


@pytest.mark.parametrize("names", [["2.jpg", "10.jpg"], ["a.jpg", "B.jpg"], ["x_9_a.jpg", "x_10_a.jpg"]])
def test_a_list_for_names_that_programs_sort_differently_is_refused(tmp_path, mentions, names):
    with pytest.raises(UserError, match=mentions("labels.txt", *names, "IMAGE,CLASS")):
        read(tmp_path, "x\ny\n", names)
    assert read(tmp_path, f"{names[0]},x\n{names[1]},y\n", names) == ["x", "y"]


def test_a_header_is_no_class(tmp_path, mentions):
    with pytest.raises(UserError, match=mentions("labels.txt", "Label", "header")):
        read(tmp_path, "Label\nA\nB\n")
    assert read(tmp_path, "label\nA\nlabel\n") == ["A", "label", "label"]


def test_two_texts_of_one_number_are_refused(tmp_path, mentions):
    for other in ("01", "+1"):
        with pytest.raises(UserError, match=mentions("labels.txt", "one number", 1)):
            read(tmp_path, f"1\n{other}\n2\n")
    assert read(tmp_path, "01\n02\n01\n") == ["02", "01", "01"]


def test_a_table_may_begin_with_rows_of_other_images(tmp_path):
    assert read(tmp_path, "image,label\ny,Q\nz,Q\na,A\nb,B\nc,C\n") == ["B", "A", "C"]


def test_folders_may_be_those_of_windows(tmp_path):
    assert read(tmp_path, "val\\a,A\nval\\b,B\nval\\c,C") == ["B", "A", "C"]


@pytest.mark.parametrize("value, word", [("-1", "unlabelled"), ("0.5", "whole"), ("A\0B", "control"), ("1000000", "0")])
def test_a_value_that_is_no_class_is_refused(tmp_path, mentions, value, word):
    for text in (f"1\n{value}\n1\n", f"a,1\nb,{value}\nc,1\n"):
        with pytest.raises(UserError, match=mentions("labels.txt", word)):
            read(tmp_path, text)


def test_whole_numbers_written_as_floats_are_those_numbers(tmp_path):
    assert read(tmp_path, "a,1.0\nb,2\nc,1\n") == ["2", "1", "1"]


@pytest.mark.parametrize("row", ["a.JPEG,red,A", "a\tA\t1", "a,tench, Tinca tinca"])
def test_a_third_column_is_refused(tmp_path, mentions, row):
    with pytest.raises(UserError, match=mentions("labels.txt", "columns", "quotes")):
        read(tmp_path, f"{row}\nb,B\nc,C\n")


def test_a_row_that_is_too_long_for_a_csv_is_one_line(tmp_path, mentions):
    with pytest.raises(UserError, match=mentions("labels.txt", "limit")):
        read(tmp_path, f"a,{'x' * 200_000}\nb,B\nc,C\n")


@pytest.mark.parametrize("row", ['a,"A\nA"', 'a,"A', 'a,"A"A'])
def test_a_quote_that_does_not_end_in_its_line_is_refused(tmp_path, mentions, row):
    with pytest.raises(UserError, match=mentions("labels.txt", "a,")):
        read(tmp_path, f"{row}\nb,B\nc,C\n")


def test_two_images_of_one_name_are_refused(tmp_path, mentions):
    with pytest.raises(UserError, match=mentions("a.png")):
        read(tmp_path, "A\nB\n", ["a.png", "a.png"])


def test_the_numbers_of_imagenets_development_kit_are_refused(tmp_path, mentions):
    names = [f"ILSVRC2012_val_0000000{number}.JPEG" for number in (1, 2, 3)]
    for text in ("490\n361\n171\n", "".join(f"{name} 65\n" for name in names)):
        with pytest.raises(ClassesDiffer, match=mentions("labels.txt", "n01440764", "LOC_val_solution.csv")):
            read(tmp_path, text, names)
    assert read(tmp_path, "n01\nn02\nn01\n", names) == ["n01", "n02", "n01"]


def test_a_pipe_is_refused(tmp_path, mentions):
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=mentions("pipe", "regular")):
        read_label_file(tmp_path / "pipe", NAMES)


def test_images_in_several_folders_are_classes_already(mentions):
    check_one_folder(["x/a", "x/b"], "here")
    with pytest.raises(UserError, match=mentions("here", "x", "y", "--labels")):
        check_one_folder(["x/a", "y/b"], "here")
