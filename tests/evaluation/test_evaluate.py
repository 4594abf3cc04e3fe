"""`evaluate` end to end: models with known scores, several processes, and users' mistakes."""

import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import unite_fast
from unite_fast.data_pipeline import open_source
from unite_fast.data_pipeline.splits import ClassesDiffer
from unite_fast.distributed.process_group import Ranks
from unite_fast.errors import UserError
from unite_fast.evaluation import evaluate as module
from unite_fast.evaluation.evaluate import evaluate, sampling_configs
from unite_fast.evaluation.evaluator import bias_warning
from unite_fast.evaluation.inception import inception_shapes
from unite_fast.evaluation.reference import save_statistics
from unite_fast.evaluation.report import lines
from unite_fast.evaluation.settings import EvaluationSettings
from unite_fast.sampling.pipeline import weights_sha256


def test_a_perfect_model_and_a_collapsed_one_get_their_known_scores(perfect):
    result = evaluate(perfect, EvaluationSettings(count=600, guidance=(1.0, 3.0), batch=100))
    zeros, right = result["generated"]
    # Without guidance it generates zeros only, right for one label in ten.
    assert zeros["class_agreement"] == pytest.approx(0.1)
    assert right["class_agreement"] >= 0.95
    # Measured: 15.2 for zeros, 0.30 for 600 of the 1,437 real images, 0.0009 for 1,430 of them.
    assert right["frechet_distance"] < 1 < 10 < zeros["frechet_distance"]
    assert right["precision"] == zeros["precision"] == 1
    assert right["recall"] > 0.8 > 0.1 > zeros["recall"]
    assert abs(right["kid"]) < 0.01 < zeros["kid"]
    rebuilt = result["reconstruction"]
    assert rebuilt["psnr"] == pytest.approx(48.13, abs=0.005) == rebuilt["psnr_of_mean_error"]
    assert rebuilt["l1"] == pytest.approx(1 / 255)
    assert rebuilt["images"] == 360 and rebuilt["frechet_distance"] < 0.01
    assert rebuilt["real_class_agreement"] == pytest.approx(358 / 360) == rebuilt["class_agreement"]


def test_a_result_records_model_settings_and_reference(model, tmp_path):
    settings = EvaluationSettings(count=30, sampling={"solver": "heun", "steps": 2}, seed=5, batch=20)
    result = evaluate(model, settings, tmp_path / "new" / "here", "runs/x")
    assert json.loads((tmp_path / "new" / "here" / "evaluation.json").read_text()) == json.loads(json.dumps(result))
    checkpoint = result["checkpoint"]
    assert checkpoint == {
        **{"path": "runs/x", "weights": "EMA", "step": 20, "name": "digits"},
        "weights_sha256": weights_sha256(model),
    }
    # The recipe is unguided here, so there is one scale.
    (one,) = result["generated"]
    expected = {"guidance": 1, "interval": (0.0, 1.0), "solver": "heun", "steps": 2, "order": "norm_first"}
    assert {name: one[name] for name in expected} == expected
    assert (one["count"], one["seed"], one["batch"], one["network_precision"]) == (30, 5, 20, "float32")
    reference = result["reference"]
    assert reference["images"] == 1437 and re.fullmatch("[0-9a-f]{64}", reference["data_sha256"])
    assert result["features"]["title"] == "Frechet distance of PCA-reduced pixels"
    assert one["seconds"] > 0 and result["versions"]["torch"] == torch.__version__
    table = (tmp_path / "new" / "here" / "evaluation.md").read_text()
    assert "| unguided | 0 to 1 | heun | 2 | float32 | 30 |" in table and checkpoint["weights_sha256"] in table
    for name, rows in (("samples_guidance_1.png", 3), ("reconstructions.png", 4)):
        with Image.open(tmp_path / "new" / "here" / name) as picture:
            assert picture.size == ((10 * 9 + 1) * 6, (rows * 9 + 1) * 6)


@pytest.mark.parametrize(
    ("solver", "steps", "time_shift"),
    [("euler", 1, 0.5), ("heun", 1, 0.5), ("multistep", 1, None), ("dopri5", None, None)],
)
def test_settings_that_the_solver_does_not_use_are_null(model, tmp_path, solver, steps, time_shift):
    # With zero weights dopri5 takes few steps.
    for parameter in model.network.parameters():
        parameter.zero_()
    settings = EvaluationSettings(count=10, sampling={"solver": solver, "steps": 1}, reconstructions=0)
    evaluate(model, settings, tmp_path)
    (one,) = json.loads((tmp_path / "evaluation.json").read_text())["generated"]
    assert (one["solver"], one["steps"], one["time_shift"]) == (solver, steps, time_shift)
    assert f"| {solver} | {steps or 'own'} | float32 |" in (tmp_path / "evaluation.md").read_text()


def test_each_guidance_scale_is_evaluated_once(model):
    def scales(*guidance: float) -> list[float]:
        return [one.guidance for one in sampling_configs(model, EvaluationSettings(guidance=guidance))]

    assert scales(3.0, 1.0, 3.0) == [3.0, 1.0]
    assert scales() == [1.0], "the recipe is unguided itself"
    model.config.sampling = model.config.sampling.changed(guidance=2.0)
    assert scales() == [1.0, 2.0]


def test_the_digest_depends_on_the_weights_only(model, trained_folder):
    same = unite_fast.load(trained_folder)
    assert weights_sha256(same) == weights_sha256(model)
    with torch.no_grad():
        next(same.network.parameters()).view(-1)[0] += 1e-6
    assert weights_sha256(same) != weights_sha256(model)


def evaluate_on_a_rank(folder: str, settings: EvaluationSettings) -> dict:
    torch.distributed.init_process_group("gloo")
    return evaluate(unite_fast.load(folder), settings)


NUMBERS = ("frechet_distance", "kid", "kid_deviation", "precision", "recall", "class_agreement")


def test_the_number_of_processes_does_not_change_the_result(ranks, trained_folder):
    settings = EvaluationSettings(count=150, batch=32, guidance=(2.0,), sampling={"steps": 1})
    alone = evaluate(unite_fast.load(trained_folder), settings)
    for world in (2, 4):
        for shared in ranks(world, evaluate_on_a_rank, str(trained_folder), settings):
            assert shared["processes"] == world
            for name in NUMBERS:
                a, b = shared["generated"][0][name], alone["generated"][0][name]
                assert abs(a - b) <= 1e-9 * max(1, abs(b)), name
            for name in ("images", "psnr", "psnr_of_mean_error", "l1", "frechet_distance", "class_agreement"):
                a, b = shared["reconstruction"][name], alone["reconstruction"][name]
                assert abs(a - b) <= 1e-9 * max(1, abs(b)), name
            assert shared["reference"] == alone["reference"]


def test_the_batch_does_not_change_the_result(model):
    """Beyond rounding: with AVX-512, matmuls of another batch round otherwise (1.5e-9 seen)."""
    one, other = (
        evaluate(model, EvaluationSettings(count=100, batch=batch, sampling={"steps": 1})) for batch in (100, 16)
    )
    for name in NUMBERS:
        a, b = one["generated"][0][name], other["generated"][0][name]
        assert abs(a - b) <= 1e-8 * max(1, abs(b)), name
    for name in ("psnr", "l1", "frechet_distance", "class_agreement"):
        a, b = one["reconstruction"][name], other["reconstruction"][name]
        assert abs(a - b) <= 1e-8 * max(1, abs(b)), name


@pytest.fixture(scope="module")
def digits_npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("stats") / "digits.npz"
    save_statistics("digits", 0, "train", EvaluationSettings(), path, Ranks(), "cpu")
    return path


def test_a_reference_file_gives_the_same_result(model, digits_npz):
    settings = EvaluationSettings(count=20, sampling={"steps": 1}, reconstructions=0)
    fresh = evaluate(model, settings)
    from_file = evaluate(model, replace(settings, reference=str(digits_npz)))
    assert from_file["generated"][0]["frechet_distance"] == fresh["generated"][0]["frechet_distance"]
    assert from_file["reference"]["data_sha256"] == fresh["reference"]["data_sha256"]
    assert from_file["reference"]["sha256"] == hashlib.sha256(digits_npz.read_bytes()).hexdigest()
    assert from_file["reconstruction"] is None


@pytest.fixture(scope="module")
def inception_file(fidelity, tmp_path_factory):
    """Random weights: the options that accept them."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(fidelity.random_weights(inception_shapes()), path)
    return {"inception": str(path), "inception_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_with_inception_there_are_fid_and_inception_score(model, inception_file, tmp_path, mentions):
    settings = EvaluationSettings("inception", **inception_file)
    for i in range(4):
        (tmp_path / "data" / "c").mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (9, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "data" / "c" / f"{i}.png")
    reference = tmp_path / "ref.npz"
    save_statistics(str(tmp_path / "data"), 8, "train", settings, reference, Ranks(), "cpu")
    settings = replace(settings, reference=str(reference), count=10, sampling={"steps": 1}, reconstructions=0)
    result = evaluate(model, settings)
    (one,) = result["generated"]
    assert one["frechet_distance"] > 0 and one["inception_score"] >= 1 and "class_agreement" not in one
    assert result["features"]["sha256"] == inception_file["inception_sha256"]
    printed = "\n".join(lines(result))
    assert "gFID" in printed and "IS 1." in printed and "KID" in printed
    assert re.search(mentions(10, 2048), printed)


def test_warnings_of_few_images():
    assert "covariance has rank 99 at most, which makes the Frechet distance too large" in bias_warning(
        100, 100, "real"
    )
    assert "falls as 1 / count" in bias_warning(999, 100, "generated")
    assert bias_warning(1000, 100, "generated") == ""


def test_missing_or_mismatched_features(model, inception_file, digits_npz, tmp_path, mentions):
    def error(**settings) -> str:
        with pytest.raises(UserError) as caught:
            evaluate(model, EvaluationSettings(**settings))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "--reference REF.npz" in error(features="inception", **inception_file)
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, mu=np.zeros(2048), sigma=np.eye(2048))
    assert "weights-inception-2015-12-05-6726825d.pth" in error(reference=str(foreign))
    assert re.search(mentions(foreign, "pixels"), error(reference=str(foreign), features="pixels"))
    message = error(reference=str(digits_npz), features="inception", **inception_file)
    assert re.search(mentions("digits.npz", "pixels", "inception", 2048), message)
    model.config.model.image_size = 16
    assert re.search(mentions("digits.npz", 8, "16 x 16"), error(reference=str(digits_npz)))
    model.config.model.image_size = 128
    assert re.search(mentions("pixels", "128 x 128", "64 x 64"), error(features="pixels"))
    assert "--reference REF.npz" in error()


@pytest.mark.parametrize(
    ("wrong", "tokens"),
    [
        ({"features": "clip"}, ("--features", "'clip'", "auto", "inception", "pixels")),
        ({"count": 0}, ("--count", 0, 2)),
        ({"count": 1}, ("--count", 1, 2)),
        ({"reconstructions": -1}, ("--reconstructions", -1, 2)),
        ({"reconstructions": 1}, ("--reconstructions", 1, 2)),
        ({"batch": 0}, ("--batch", 0)),
        ({"seed": -1}, ("--seed", -1)),
        ({"precision": "int8"}, ("--precision", "'int8'", "float32", "bfloat16")),
        ({"guidance": (float("nan"),)}, ("--guidance", "finite")),
        ({"inception_sha256": "67"}, ("--inception-sha256", 8, 64)),
    ],
)
def test_settings_out_of_range(wrong, tokens, mentions):
    with pytest.raises(UserError, match=mentions(*tokens)):
        EvaluationSettings(**wrong)


def test_unreadable_images_are_counted(model, tmp_path, mentions):
    images, labels = open_source("digits", "", 8, "train").read(range(60))
    for split in ("train", "val"):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = tmp_path / split / str(int(label))
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    for name in ("train/3/3.png", "val/4/4.png", "val/5/5.png"):
        (tmp_path / name).write_bytes(b"no picture")
    model.config.data.source, model.config.data.path = "folder", str(tmp_path)
    result = evaluate(model, EvaluationSettings(count=20, sampling={"steps": 1}, batch=16))
    assert (result["reference"]["images"], result["reference"]["unreadable"]) == (59, 1)
    assert (result["reconstruction"]["images"], result["reconstruction"]["unreadable"]) == (58, 2)
    four, five = result["reconstruction"]["unreadable_first"]
    assert four.startswith("4/4.png: ") and five.startswith("5/5.png: ")
    printed = "\n".join(lines(result))
    assert re.search(mentions(2, four), printed) and re.search(mentions(1, "3/3.png"), printed)
    for path in (tmp_path / "val").rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=mentions("60 of 60", "9/9.png")):
        evaluate(model, EvaluationSettings(count=20, sampling={"steps": 1}))


def write_digits(folder, count=40):
    images, labels = open_source("digits", "", 8, "test").read(range(count))
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / str(int(label)) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def said(result, out):
    """Everything that an evaluation says."""
    return "\n".join([*lines(result), (out / "evaluation.md").read_text(), (out / "evaluation.json").read_text()])


def test_images_are_called_held_out_only_if_they_are(model, tmp_path):
    settings = EvaluationSettings(count=20, sampling={"steps": 1})
    write_digits(tmp_path / "flat")
    for split in ("train", "valid"):
        write_digits(tmp_path / "apart" / split)
    write_digits(tmp_path / "val")
    model.config.data.source, model.config.data.path = "folder", str(tmp_path / "flat")
    for data, kind in (
        ("", "training images"),
        (str(tmp_path / "flat"), "training images"),
        (str(tmp_path / "apart"), "held-out images"),
        (str(tmp_path / "val"), "held-out images"),
        (str(tmp_path / "apart" / "train"), "given images"),
    ):
        result = evaluate(model, replace(settings, data=data), tmp_path / "out")
        assert result["reconstruction"]["kind"] == kind
        text = said(result, tmp_path / "out")
        assert f"40 {kind}" in text and ("held-out" in text) == (kind == "held-out images")


def test_data_whose_labels_mean_other_classes_are_refused(model, tmp_path, mentions):
    """Else agreement with the classes would be wrong in silence: the data alone are consistent."""
    settings = EvaluationSettings(count=20, sampling={"steps": 1}, data=str(tmp_path))
    write_digits(tmp_path)
    (tmp_path / "9").rename(tmp_path / "91")
    with pytest.raises(UserError, match=mentions("class 9", "'91'", "'9'")):
        evaluate(model, settings)
    model.class_names = []  # of an earlier version
    evaluate(model, settings)
    model.class_names = list("abcdefghij")  # numbers, as some formats have them, are not compared with names
    evaluate(model, settings)
    for digit, name in enumerate([*map(str, range(9)), "91"]):
        (tmp_path / name).rename(tmp_path / "abcdefgihj"[digit])
    evaluate(model, settings)
    model.class_names = list("abcdefghji")
    with pytest.raises(UserError, match=mentions("class 8", "'i'", "'j'")):
        evaluate(model, settings)
    model.class_names = list("abcdefghi")
    with pytest.raises(UserError, match=mentions("class 9", "'j'", None)):
        evaluate(model, settings)


def test_folders_in_the_place_of_files_are_found_before_the_work(model, tmp_path, mentions):
    for name in ("evaluation.json", "samples_guidance_7.png"):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=mentions(tmp_path / name)):
            evaluate(model, EvaluationSettings(count=10**8), tmp_path)
        (tmp_path / name).rmdir()
    (tmp_path / "samples_guidance_7.png").write_text("mine")
    with pytest.raises(UserError, match=mentions(tmp_path / "samples_guidance_7.png")):
        evaluate(model, EvaluationSettings(count=10**8), tmp_path)


def test_statistics_say_which_split_they_are_of(tmp_path):
    write_digits(tmp_path / "flat")
    for split in ("train", "valid"):
        write_digits(tmp_path / "apart" / split)
    for name, said in (("flat", "no splits: all images"), ("apart", "valid")):
        made = save_statistics(
            str(tmp_path / name), 8, "val", EvaluationSettings(), tmp_path / "ref.npz", Ranks(), "cpu"
        )
        assert made.provenance["split"] == said


def test_a_held_out_split_of_other_classes_or_without_images_is_an_error(model, tmp_path, mentions):
    settings = EvaluationSettings(count=20, sampling={"steps": 1}, data=str(tmp_path))
    write_digits(tmp_path / "train")
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match=mentions(tmp_path / "val", "--data FOLDER")):
        evaluate(model, settings)
    write_digits(tmp_path / "val")
    (tmp_path / "val" / "3").rename(tmp_path / "val" / "n3")
    with pytest.raises(ClassesDiffer, match=mentions(tmp_path / "val" / "n3", tmp_path / "train")):
        evaluate(model, settings)


def test_data_may_have_another_format_than_the_training_data(model, tmp_path, mentions):
    images, labels = open_source("digits", "", 8, "test").read(range(60))
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        for split in ("train", "val"):
            folder = tmp_path / "data" / split / str(int(label))
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    settings = EvaluationSettings(count=20, sampling={"steps": 1}, data=str(tmp_path / "data"))
    from_images = evaluate(model, settings)
    assert (from_images["reference"]["images"], from_images["reconstruction"]["images"]) == (60, 60)
    # An imported model knows that its data are a folder, but not which one.
    model.config.data.source = "folder"
    assert evaluate(model, settings)["reconstruction"]["psnr"] == from_images["reconstruction"]["psnr"]
    with pytest.raises(UserError, match=mentions("data.path", "training", "--data FOLDER")):
        evaluate(model, replace(settings, data=""))
    model.config.model.num_classes = 11
    with pytest.raises(UserError, match=mentions(10, 11, "--data FOLDER")):
        evaluate(model, settings)
    reference = tmp_path / "ref.npz"
    save_statistics(str(tmp_path / "data"), 8, "train", settings, reference, Ranks(), "cpu")
    model.config.model.num_classes = 1  # so no classifier is fitted, which would read them
    with pytest.raises(UserError, match=mentions("data.path", "--data FOLDER", "--reconstructions 0")):
        evaluate(model, replace(settings, data="", reference=str(reference)))


def test_mistakes_are_reported_before_the_work(model, tmp_path, monkeypatch, mentions):
    monkeypatch.setattr(module, "open_evaluator", None)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=mentions(tmp_path / "file", "--out")):
        evaluate(model, EvaluationSettings(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    for wrong in ({"foo": 1}, {"solver": "magic"}, {"steps": 0}, {"interval": (1.0, 0.0)}):
        with pytest.raises(UserError, match=f"sampling.{next(iter(wrong))}"):
            evaluate(model, EvaluationSettings(sampling=wrong))
