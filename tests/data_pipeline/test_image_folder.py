"""Image folders: which files are listed, how they are decoded, and each fault of a folder or file."""

import os
import shutil
import socket
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from unite_fast.data_pipeline import UnreadableSample, open_source
from unite_fast.data_pipeline.image_folder import read_images
from unite_fast.data_pipeline.images import adm_center_crop
from unite_fast.errors import UserError

SIZE = 16


def picture(seed, height=20, width=24):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(path, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, **options)
    return path


def open_(path, split="train", size=SIZE):
    return open_source("folder", str(path), size, split)


def test_classes_and_files_are_sorted_and_nested_files_are_listed(tmp_path):
    for seed, name in enumerate(["b/2.png", "b/10.PNG", "a/z.JPEG", "a/deep/er/x.jpg", "c/1.webp", "c/0.bmp"]):
        save(tmp_path / name, seed)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "._z.jpg").write_text("metadata of a Mac")
    save(tmp_path / ".cache" / "hidden.png")
    save(tmp_path / "a" / ".thumbs" / "hidden.png")
    save(tmp_path / "loose.png")
    source = open_(tmp_path)
    assert source.class_names == ["a", "b", "c"]
    names = [source.name(index).replace(os.sep, "/") for index in range(len(source))]
    assert names == ["a/deep/er/x.jpg", "a/z.JPEG", "b/10.PNG", "b/2.png", "c/0.bmp", "c/1.webp"]

    images, labels = source.read(range(6))
    assert images.dtype == torch.uint8 and images.shape == (6, 3, SIZE, SIZE) and images.is_contiguous()
    assert labels.dtype == torch.int64 and labels.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(images[3].permute(1, 2, 0), adm_center_crop(picture(0), SIZE))
    np.testing.assert_array_equal(images[2].permute(1, 2, 0), adm_center_crop(picture(1), SIZE))


@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "test", "dev", "eval", "Testing"])
def test_each_split_has_its_folder(tmp_path, held_out):
    for name in ("train/a/0.png", "train/b/1.png", f"{held_out}/b/2.png"):
        save(tmp_path / name)
    (tmp_path / "annotations").mkdir()
    train, test = open_(tmp_path), open_(tmp_path, "test")
    assert (len(train), len(test)) == (2, 1)
    # A label means the same class in both, though the held-out images lack one.
    assert train.class_names == test.class_names == ["a", "b"]
    assert test.read([0])[1].tolist() == [1]


def test_validation_is_chosen_by_each_of_its_names_and_test_by_test(tmp_path, mentions):
    for name in ("train/a/0.png", "valid/a/1.png", "test/a/2.png", "test/a/3.png"):
        save(tmp_path / name)
    for split, name, count in (
        ("val", "valid", 1),
        ("validation", "valid", 1),
        ("test", "test", 2),
        ("train", "train", 1),
    ):
        source = open_(tmp_path, split)
        assert (source.split, source.held_out, len(source)) == (name, split != "train", count)
    shutil.rmtree(tmp_path / "valid")
    with pytest.raises(UserError, match=mentions("val", "train", "test")):
        open_(tmp_path, "val")


def test_a_flat_test_split_gives_way_to_validation(tmp_path):
    for name in ("train/a/0.png", "val/a/1.png", "test/2.png"):
        save(tmp_path / name)
    assert open_(tmp_path, "test").split == "val"


def test_held_out_images_that_are_the_training_images_are_refused(tmp_path, mentions):
    save(tmp_path / "train" / "a" / "0.png")
    (tmp_path / "val").symlink_to(tmp_path / "train", target_is_directory=True)
    with pytest.raises(UserError, match=mentions(tmp_path / "val", "link")):
        open_(tmp_path, "val")


def test_an_empty_held_out_split_is_an_error(tmp_path, mentions):
    save(tmp_path / "train" / "a" / "0.png")
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match=mentions(tmp_path / "val")):
        open_(tmp_path, "val")


def test_two_links_to_one_class_are_refused(tmp_path, mentions):
    save(tmp_path / "a" / "0.png")
    (tmp_path / "b").symlink_to(tmp_path / "a", target_is_directory=True)
    with pytest.raises(UserError, match=mentions("a", "b")):
        open_(tmp_path)


def test_what_is_left_out_is_counted_and_named(tmp_path):
    save(tmp_path / "a" / "0.png")
    for name in ("a/notes.txt", "a/0.cls", "a/.hidden.png", "loose.png", ".DS_Store"):
        (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "elsewhere").mkdir()
    save(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "a" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    source = open_(tmp_path)
    assert [source.name(index) for index in range(len(source))] == ["a/0.png", "elsewhere/1.png"]
    lines = "\n".join(source.left_out)
    for name in ("a/notes.txt", "a/0.cls", "a/.hidden.png", "loose.png", ".DS_Store", "a/pipe.png", "a/more"):
        assert name in lines
    assert len(source.left_out) == 5


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path, monkeypatch, kind):
    path = tmp_path / "0.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # the path of a socket must be short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("0.png")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(UserError, match=r"0\.png"):
        read_images([path], 8)
    if kind == "folder":
        return
    # A link is followed only when the image is read.
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "0.png").symlink_to(path)
    with pytest.raises(UnreadableSample, match=r"a/0\.png"):
        open_(tmp_path / "set").read([0])


def test_a_large_listing_is_three_arrays(tmp_path):
    for number in range(300):
        (tmp_path / f"class{number % 3}").mkdir(exist_ok=True)
        (tmp_path / f"class{number % 3}" / f"{number:05d}.JPEG").touch()
    source = open_(tmp_path)
    assert source.labels.dtype == np.int32 and source.labels.tolist() == [0] * 100 + [1] * 100 + [2] * 100
    assert source.class_counts() == [100] * 3
    objects = [value for value in vars(source).values() if isinstance(value, (list, tuple, dict))]
    assert sum(len(value) for value in objects) < 10, "no list of names or labels"


def test_a_held_out_class_that_train_lacks_is_refused(tmp_path, mentions):
    for name in ("train/a/0.png", "val/z/1.png"):
        save(tmp_path / name)
    with pytest.raises(UserError, match=mentions(tmp_path / "val" / "z", tmp_path / "train")):
        open_(tmp_path, "test")


def test_train_alone_has_no_test_split(tmp_path, mentions):
    save(tmp_path / "train" / "a" / "0.png")
    assert open_(tmp_path).class_names == ["a"]
    with pytest.raises(UserError, match=mentions("val", "test", tmp_path)):
        open_(tmp_path, "test")


def test_a_class_called_train_is_a_class(tmp_path):
    for name in ("train/0.png", "tram/1.png"):
        save(tmp_path / name)
    assert open_(tmp_path).class_names == ["train", "tram"]


def test_without_split_folders_both_splits_are_the_same_images(tmp_path):
    save(tmp_path / "a" / "0.png")
    assert open_(tmp_path, "test").name(0) == open_(tmp_path).name(0)


def test_wrong_folders_are_refused(tmp_path, mentions):
    with pytest.raises(UserError, match=mentions(tmp_path / "nowhere", "data.path=FOLDER")):
        open_(tmp_path / "nowhere")
    file = save(tmp_path / "file.png")
    with pytest.raises(UserError, match=mentions(file)):
        open_(file)
    with pytest.raises(UserError, match=mentions(tmp_path, "class")):
        open_(tmp_path)
    save(tmp_path / "a" / "0.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "readme.txt").write_text("soon")
    with pytest.raises(UserError, match=mentions(tmp_path / "b", ".png")):
        open_(tmp_path)


def test_a_class_folder_may_be_a_link(tmp_path):
    save(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert open_(tmp_path / "root").class_names == ["a"]


def test_a_name_is_one_line_of_text(tmp_path):
    save(tmp_path / "a" / "0.png")
    try:
        (tmp_path / "a" / "0.png").rename(os.fsdecode(os.fsencode(tmp_path / "a") + b"/\xff\n.png"))
    except OSError:
        pytest.skip("this file system takes text only")
    source = open_(tmp_path)
    assert source.name(0) == os.path.join("a", "\\xff .png")
    source.read([0])


def tiny_png(header, body):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def broken(kind, folder):
    file = folder / "bad.jpg"
    if kind == "truncated JPEG":
        file.write_bytes(save(file).read_bytes()[:-200])
    elif kind == "truncated PNG":
        file = folder / "bad.png"
        file.write_bytes(save(file).read_bytes()[:300])
    elif kind == "truncated WebP":
        file = folder / "bad.webp"
        file.write_bytes(save(file).read_bytes()[:100])
    elif kind == "text":
        file.write_text("404 not found\n")
    elif kind == "PostScript":
        file.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "noise after a JPEG's first bytes":
        file.write_bytes(b"\xff\xd8\xff\xe0" + np.random.default_rng(0).bytes(500))
    elif kind == "bomb":
        file = folder / "bad.png"
        file.write_bytes(tiny_png(struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0), zlib.compress(bytes(1000))))
    elif kind == "sliver":
        file = folder / "bad.png"
        Image.new("L", (2_000_000, 1)).save(file)
    elif kind == "link to nothing":
        file.symlink_to(folder / "gone.jpg")
    return file


REASONS = {
    "truncated JPEG": "truncated",
    "truncated PNG": None,
    "truncated WebP": None,
    "text": "not an image",
    "PostScript": "not an image",
    "empty": "not an image",
    "noise after a JPEG's first bytes": None,
    "bomb": "pixels",
    "sliver": "long and narrow",
    "link to nothing": "No such file",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_broken_file_is_named_with_a_reason(tmp_path, kind):
    save(tmp_path / "a" / "good.png")
    name = broken(kind, tmp_path / "a").name
    source = open_(tmp_path)
    assert source.name(0) == os.path.join("a", name)
    with pytest.raises(UnreadableSample, match=REASONS[kind]) as caught:
        source.read([1, 0])
    assert caught.value.name == source.name(0)
    assert caught.value.reason and "\n" not in str(caught.value)
    source.read([1])


def test_every_mode_becomes_rgb(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    rgb = picture(3, SIZE, SIZE)
    rgb.convert("CMYK").save(folder / "0_cmyk.jpg", quality=95)
    high = np.random.default_rng(1).integers(0, 65536, (SIZE, SIZE), dtype=np.uint16)
    Image.fromarray(high).save(folder / "1_16bit.png")
    palette = rgb.quantize(8)
    palette.save(folder / "2_palette.png", transparency=bytes((0, 100, 255)))
    rgb.convert("RGBA").save(folder / "3_rgba.png")
    rgb.convert("LA").save(folder / "4_la.png")
    images, _ = open_(tmp_path).read(range(5))
    images = images.permute(0, 2, 3, 1).numpy()
    with Image.open(folder / "0_cmyk.jpg") as cmyk:
        assert cmyk.mode == "CMYK"
        np.testing.assert_array_equal(images[0], cmyk.convert("RGB"))
    np.testing.assert_array_equal(images[1], np.stack([high >> 8] * 3, -1))
    np.testing.assert_array_equal(images[2], palette.convert("RGB"))
    np.testing.assert_array_equal(images[3], rgb)
    np.testing.assert_array_equal(images[4], rgb.convert("L").convert("RGB"))


def test_orientation_in_exif_is_ignored(tmp_path):
    rotated = Image.Exif()
    rotated[0x0112] = 6
    save(tmp_path / "a" / "0.png")
    save(tmp_path / "a" / "1.png", exif=rotated)
    images, _ = open_(tmp_path).read([0, 1])
    assert torch.equal(images[0], images[1])


def test_a_jpeg_of_two_images_is_its_first(tmp_path):
    (tmp_path / "a").mkdir()
    picture(1).save(tmp_path / "a" / "0.jpg")
    picture(1).save(tmp_path / "a" / "1.jpg", format="MPO", save_all=True, append_images=[picture(2)])
    images, _ = open_(tmp_path).read([0, 1])
    assert torch.equal(images[0], images[1])


def test_the_format_is_read_from_the_contents(tmp_path):
    save(tmp_path / "a" / "0.jpg", seed=5, format="PNG")
    images, _ = open_(tmp_path).read([0])
    np.testing.assert_array_equal(images[0].permute(1, 2, 0), adm_center_crop(picture(5), SIZE))


def test_images_are_read_in_order_and_cropped(tmp_path):
    for name, value in (("a.png", 10), ("b.jpg", 200)):
        Image.new("RGB", (20, 12), (value, value, value)).save(tmp_path / name)
    images = read_images([tmp_path / "b.jpg", tmp_path / "a.png"], 8)
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [200, 10]


def test_a_file_that_cannot_be_read_is_named(tmp_path, mentions):
    (tmp_path / "a.png").write_bytes(b"text")
    for path in (tmp_path / "a.png", tmp_path / "nowhere.png"):
        with pytest.raises(UserError, match=mentions(path)):
            read_images([path], 8)


def test_splits_within_a_folder_are_no_classes(tmp_path, mentions):
    for name in ("cat/train/0.png", "cat/val/1.png", "dog/0.png", "up/data/Training/a/0.png", "up/data/test/a/1.png"):
        save(tmp_path / name)
    for folder, words in ((tmp_path, ("cat", "train", "val")), (tmp_path / "up", ("data", "Training", "test"))):
        with pytest.raises(UserError, match=mentions(*words)):
            open_(folder)
    save(tmp_path / "classes" / "cat" / "train" / "0.png")  # a toy, as nothing is beside it
    assert open_(tmp_path / "classes").class_names == ["cat"]


def test_what_belongs_to_no_split_is_named(tmp_path):
    for name in ("train/a/0.png", "val/a/1.png", "more/a/2.png", "loose.png"):
        save(tmp_path / name)
    assert open_(tmp_path).left_out == ["2 that belong to no split: more, loose.png"]


def test_links_that_give_an_image_two_labels_or_splits_are_refused(tmp_path, mentions):
    def check(name, target, folder, split, *words):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
        with pytest.raises(UserError, match=mentions(*words)):
            open_(tmp_path / folder, split)
        (tmp_path / name).unlink()

    for name in ("classes/cat/0.png", "classes/dog/black/1.png", "train/cat/0.png", "train/dog/1.png", "val/dog/2.png"):
        save(tmp_path / name)
    check("classes/all", ".", "classes", "train", "all", "above")
    check("classes/black", "dog/black", "classes", "train", "black", "dog")
    shutil.rmtree(tmp_path / "classes")
    check("val/cat", "../train/cat", ".", "val", "cat", "held-out")
    check("train/more", "../val/dog", ".", "train", "more", "held-out")
    (tmp_path / "validation").symlink_to("val")
    assert open_(tmp_path, "validation").class_counts() == [0, 1]


def test_the_fingerprint_tells_swapped_classes_of_the_same_file_names_apart(tmp_path):
    for seed, name in enumerate(("a/0.png", "b/0.png")):
        save(tmp_path / "set" / name, seed)
    before = open_(tmp_path / "set").fingerprint()
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    assert open_(tmp_path / "copy").fingerprint() == before
    for old, new in (("a", "x"), ("b", "a"), ("x", "b")):
        (tmp_path / "copy" / old).rename(tmp_path / "copy" / new)
    assert open_(tmp_path / "copy").fingerprint() != before


def test_folders_of_a_system_are_no_classes_and_hidden_ones_are_counted(tmp_path):
    for name in ("cat/0.png", "dog/1.png", "dog/@eaDir/1.png/thumbnail.jpg", "__MACOSX/cat/1.png", "Lost+Found/2.png"):
        save(tmp_path / name)
    save(tmp_path / ".cow" / "3.png")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    source = open_(tmp_path)
    assert source.class_names == ["cat", "dog"] and len(source) == 2
    assert sorted(source.left_out) == [
        "1 in no class folder: Thumbs.db",
        "1 with a hidden name: .cow",
        "3 of a system or a tool, such as thumbnails: dog/@eaDir, Lost+Found, __MACOSX",
    ]


def test_folders_of_a_system_do_not_hide_the_splits(tmp_path):
    for name in ("train/cat/0.png", "train/dog/1.png", "train/@eaDir/2.png", "__MACOSX/train/cat/1.png"):
        save(tmp_path / name)
    source = open_(tmp_path)
    assert source.split == "train" and source.class_names == ["cat", "dog"]
    assert any("train" not in line and "@eaDir, __MACOSX" in line for line in source.left_out)


@pytest.mark.parametrize("other", ["hold-out", "validate", "train (copy)", "unlabeled"])
def test_a_split_beside_folders_of_other_names_is_no_class(tmp_path, mentions, other):
    for name in ("train/cat/0.png", "train/dog/1.png", f"{other}/cat/2.png"):
        save(tmp_path / name)
    with pytest.raises(UserError, match=mentions("train", "cat", "split")):
        open_(tmp_path)


def test_a_held_out_folder_gets_the_labels_of_the_training_images_beside_it(tmp_path, mentions):
    for name in ("train/a/0.png", "train/b/1.png", "train/c/2.png", "val/b/3.png", "val/c/4.png"):
        save(tmp_path / name)
    source = open_(tmp_path / "val", "test")
    assert source.class_names == ["a", "b", "c"] and source.labels.tolist() == [1, 2]
    save(tmp_path / "val" / "z" / "5.png")
    with pytest.raises(UserError, match=mentions("val/z", "train")):
        open_(tmp_path / "val")


def test_held_out_images_that_are_among_the_training_images_are_named(tmp_path):
    for number in range(40):
        save(tmp_path / "train" / "a" / f"{number}.png", number)
        save(tmp_path / "val" / "a" / f"{number}.png", number + (0 if number < 20 else 100))
    (note,) = open_(tmp_path, "val").notes
    assert "WARNING" in note and "8 of 16" in note and "a/0.png" in note
    shutil.rmtree(tmp_path / "val")
    save(tmp_path / "val" / "a" / "0.png", 7)
    assert open_(tmp_path, "val").notes == []


def test_one_class_that_holds_folders_is_said(tmp_path):
    for name in ("imagenet/n01/0.png", "imagenet/n02/1.png"):
        save(tmp_path / name)
    (note,) = open_(tmp_path).notes
    assert "one class, imagenet" in note and "n01, n02" in note and str(tmp_path / "imagenet") in note
    save(tmp_path / "other" / "2.png")
    assert open_(tmp_path).notes == []


def test_names_of_classes_that_look_alike_are_said(tmp_path):
    for name in ("Cat", "cat", "caf\u00e9", "cafe\u0301", "dog"):
        save(tmp_path / name / "0.png")
    (note,) = open_(tmp_path).notes
    assert "'Cat' and 'cat'" in note and "1 more" in note and note.isascii()


def test_a_folder_of_tar_files_says_which_command_reads_them(tmp_path, mentions):
    (tmp_path / "n01.TAR").write_bytes(bytes(1024))
    with pytest.raises(UserError, match=mentions(tmp_path, "unite-fast shards")):
        open_(tmp_path)


def test_a_link_to_itself_is_a_broken_image_or_a_loose_file(tmp_path):
    save(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "1.png").symlink_to("1.png")
    (tmp_path / "loop").symlink_to("loop")
    source = open_(tmp_path)
    assert source.class_names == ["a"] and len(source) == 2
    assert source.left_out == ["1 in no class folder: loop"]
    with pytest.raises(UnreadableSample, match=r"a/1\.png"):
        source.read([1])
