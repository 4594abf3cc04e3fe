"""Every option of every command reaches the function that it configures. A recorder replaces that function, and each
option has a value that is not the default."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from unite_fast.commands import options as options_module


class Recorder:
    """Replaces a function; keeps the arguments of its last call by name."""

    def __init__(self, function, result=None):
        self.signature, self.result, self.calls = inspect.signature(function), result, 0

    def __call__(self, *arguments, **named):
        bound = self.signature.bind(*arguments, **named)
        bound.apply_defaults()
        self.calls += 1
        self.arguments = bound.arguments
        return self.result


@pytest.fixture
def record(monkeypatch):
    def replace(target: str, result=None) -> Recorder:
        module, _, name = target.rpartition(".")
        owner = __import__(module, fromlist=[name])
        recorder = Recorder(getattr(owner, name), result)
        monkeypatch.setattr(owner, name, recorder)
        return recorder

    return replace


@pytest.fixture
def model(monkeypatch):
    """Replaces loading: `options.load` returns this stand-in, and `load_arguments` are those of the call."""
    from unite_fast.recipes import load_config
    from unite_fast.sampling.pipeline import TrainedUNITE

    loaded = TrainedUNITE.__new__(TrainedUNITE)
    loaded.config = load_config("digits", ("train.precision=float32",))
    loaded.network = SimpleNamespace(device=SimpleNamespace(type="cpu"))

    def load(checkpoint, device):
        loaded.load_arguments = checkpoint, device
        return loaded

    monkeypatch.setattr(options_module, "load", load)
    return loaded


SAMPLING = ("--guidance", 2.5, "--interval", "0.2,0.9", "--solver", "heun", "--steps", 7)
SAMPLING_SETTINGS = {"guidance": 2.5, "interval": (0.2, 0.9), "solver": "heun", "steps": 7}


def test_sample(command, record, model, tmp_path, mentions):
    generated = record("unite_fast.commands.images.generate_with_progress", result=[0, 0, 0])
    saved = record("unite_fast.utils.images.save_images")
    out = tmp_path / "s.npz"
    ended = command(
        *("sample", "run", "--classes", "7,2", "--count", 3, "--seed", 11, "--batch", 5, "--device", "cpu"),
        *("--out", out, *SAMPLING),
    )
    assert ended.status == 0 and re.search(mentions(3, out), ended.out)
    assert model.load_arguments == (Path("run"), "cpu")
    arguments = generated.arguments
    assert list(arguments["labels"]) == [7, 2, 7]
    assert (arguments["seed"], arguments["batch"], arguments["settings"]) == (11, 5, SAMPLING_SETTINGS)
    assert saved.arguments["images"] == [0, 0, 0] and saved.arguments["out"] == out
    assert list(saved.arguments["labels"]) == [7, 2, 7]


@pytest.mark.parametrize(
    ("extra", "precision", "compiled"),
    [
        ((), "float32", False),
        (("--precision", "bfloat16", "--compile"), "bfloat16", True),
        (("--eager",), "float32", False),
    ],
)
def test_generate(command, record, model, tmp_path, extra, precision, compiled, mentions):
    written = record("unite_fast.sampling.sample_writer.write_samples", result="about.json")
    out = tmp_path / "g.npz"
    ended = command(
        *("generate", "run", "--num", 4, "--classes", "3,1", "--seed", 12, "--batch", 6, "--device", "cpu"),
        *("--out", out, *SAMPLING, *extra),
    )
    assert ended.status == 0, ended.err
    assert model.load_arguments == (Path("run"), "cpu")
    generation = written.arguments["generation"]
    assert written.arguments["out"] == out and written.arguments["model"] is model
    assert list(generation.labels) == [3, 1, 3, 1]
    assert generation.sampling == model.config.sampling.changed(**SAMPLING_SETTINGS)
    assert (generation.seed, generation.batch, generation.precision, generation.compile) == (12, 6, precision, compiled)
    assert re.search(mentions(4, out, "about.json"), ended.out)


def test_reconstruct(command, record, model, tmp_path):
    import torch

    originals, copies = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.full((2, 3, 8, 8), 9, dtype=torch.uint8)
    read = record("unite_fast.data_pipeline.image_folder.read_images", result=originals)
    saved = record("unite_fast.utils.images.save_pairs")
    model.reconstruct = lambda images: copies if images is originals else None
    out = tmp_path / "pairs.png"
    ended = command("reconstruct", "run", "a.png", "b.png", "--device", "cpu", "--out", out)
    assert ended.status == 0, ended.err
    assert list(read.arguments.values()) == [[Path("a.png"), Path("b.png")], 8]
    assert list(saved.arguments.values())[:3] == [originals, copies, out]


EVALUATION = (
    *("--features", "pixels", "--inception", "i.pt", "--inception-sha256", "abcdef12", "--reference", "r.npz"),
    *("--data", "somewhere", "--batch", 9),
)


def test_evaluate(command, record, model, tmp_path, mentions):
    ran = record("unite_fast.evaluation.evaluate.evaluate", result="result")
    record("unite_fast.evaluation.report.lines", result=["a line"])
    out = tmp_path / "e"
    ended = command(
        *("evaluate", "run", *EVALUATION, "--count", 33, "--guidance", "1,2.5", "--interval", "0.2,0.9"),
        *("--solver", "heun", "--steps", 7, "--reconstructions", 44, "--seed", 13, "--precision", "bfloat16"),
        *("--compile", "--device", "cpu", "--out", out),
    )
    assert ended.status == 0, ended.err
    line, where = ended.out.splitlines()
    assert line == "a line" and re.search(mentions(out), where)
    assert model.load_arguments == (Path("run"), "cpu")
    arguments = ran.arguments
    settings = arguments["settings"]
    assert (settings.features, settings.inception, settings.inception_sha256) == ("pixels", "i.pt", "abcdef12")
    assert (settings.reference, settings.data, settings.batch, settings.seed) == ("r.npz", "somewhere", 9, 13)
    assert (settings.count, settings.guidance, settings.reconstructions) == (33, (1.0, 2.5), 44)
    assert settings.sampling == {name: value for name, value in SAMPLING_SETTINGS.items() if name != "guidance"}
    assert (settings.precision, settings.compile) == ("bfloat16", True)
    assert out in arguments.values() and "run" in arguments.values() and model in arguments.values()


def test_defaults_of_evaluate(command, record, model, mentions):
    ran = record("unite_fast.evaluation.evaluate.evaluate", result="result")
    record("unite_fast.evaluation.report.lines", result=[])
    ended = command("evaluate", "run", "--device", "cpu")
    settings = ran.arguments["settings"]
    assert (settings.features, settings.count, settings.guidance, settings.precision) == ("auto", None, (), "")
    assert (settings.compile, settings.sampling, settings.reconstructions) == (None, {}, 50_000)
    assert re.search(mentions("evaluation"), ended.out)


def test_stats(command, record, tmp_path, mentions):
    statistics = SimpleNamespace(mean=[0.0] * 5)
    made = SimpleNamespace(count=77, statistics=statistics, features="pixels", provenance={})
    saved = record("unite_fast.evaluation.reference.save_statistics", result=made)
    out = tmp_path / "s.npz"
    ended = command(
        *("stats", "data", out, "--features", "pixels", "--inception", "i.pt", "--inception-sha256", "abcdef12"),
        *("--image-size", 32, "--split", "test", "--batch", 9, "--workers", 3, "--device", "cpu"),
    )
    assert ended.status == 0, ended.err
    arguments = list(saved.arguments.values())
    settings = arguments[3]
    assert arguments[:3] == ["data", 32, "test"] and arguments[4] == out and arguments[7] == 3
    assert (settings.features, settings.inception, settings.inception_sha256) == ("pixels", "i.pt", "abcdef12")
    assert settings.batch == 9
    assert re.search(mentions(77, 5, "pixels", out), ended.out)


@pytest.mark.parametrize(("counts", "expected"), [((), (500, 2000)), (("--count", 21, "--final-count", 22), (21, 22))])
def test_search_guidance(command, record, model, tmp_path, counts, expected, mentions):
    evaluator = SimpleNamespace(features=SimpleNamespace(name="pixels"))
    opened = record("unite_fast.evaluation.evaluator.open_evaluator", result=evaluator)
    built = record("unite_fast.evaluation.guidance_search.Objective", result="objective")
    searched = record("unite_fast.evaluation.guidance_search.search", result="found")
    saved = record("unite_fast.evaluation.guidance_report.save")
    record("unite_fast.evaluation.guidance_report.lines", result=["best"])
    out = tmp_path / "guidance"
    ended = command(
        *("search-guidance", "run", *EVALUATION, "--scales", "1:2:0.5", "--lows", "0,0.1", "--highs", "0.9:1:0.1"),
        *(*counts, "--confirm", 2, "--solver", "heun", "--steps", 7, "--seed", 14, "--precision", "bfloat16"),
        *("--compile", "--device", "cpu", "--out", out),
    )
    assert ended.status == 0, ended.err
    settings = opened.arguments["settings"]
    assert (settings.features, settings.inception, settings.inception_sha256) == ("pixels", "i.pt", "abcdef12")
    assert (settings.reference, settings.data, settings.batch) == ("r.npz", "somewhere", 9)
    grid, objective, confirm = searched.arguments.values()
    assert (list(grid.scales), list(grid.lows), list(grid.highs)) == ([1.0, 1.5, 2.0], [0.0, 0.1], [0.9, 1.0])
    assert (objective, confirm) == ("objective", 2)
    arguments = built.arguments
    assert arguments["model"] is model and arguments["evaluator"] is evaluator
    settings = arguments["settings"]
    assert settings.sampling == model.config.sampling.changed(solver="heun", steps=7)
    assert (settings.count, settings.final_count) == expected
    assert (settings.seed, settings.batch, settings.precision, settings.compile) == (14, 9, "bfloat16", True)
    assert arguments["out"] == out and saved.calls == 1
    line, where = ended.out.splitlines()
    assert line == "best" and re.search(mentions(out), where)


@pytest.mark.parametrize(("real", "data"), [("--real", "somewhere"), ("--no-real", None)])
def test_gallery(command, record, model, tmp_path, real, data):
    made = record("unite_fast.evaluation.gallery.make_gallery", result=("head", []))
    record("unite_fast.evaluation.gallery_page.render", result="<html>")
    out = tmp_path / "g.html"
    ended = command(
        *("gallery", "run", "--out", out, "--data", "somewhere", real, "--classes", "3,1", "--per-class", 4),
        *("--scales", "1,2", "--seed", 15, "--batch", 6, "--device", "cpu", *SAMPLING),
    )
    assert ended.status == 0, ended.err
    model_used, checkpoint, settings = made.arguments.values()
    assert model_used is model and checkpoint == Path("run") and model.load_arguments == (Path("run"), "cpu")
    assert (settings.classes, settings.per_class, settings.scales) == ([3, 1], 4, (1.0, 2.0))
    assert (settings.data, settings.seed, settings.batch, settings.sampling) == (data, 15, 6, SAMPLING_SETTINGS)
    assert out.read_text() == "<html>"


def test_train(command, record, tmp_path):
    outcome = SimpleNamespace(stopped_by=0)
    ran = record("unite_fast.training.trainer.train", result=outcome)
    assert command("train", "fashion_mnist", "train.steps=7", "seed=4", "--resume").status == 0
    assert (ran.arguments["config"].name, ran.arguments["config"].train.steps) == ("fashion_mnist", 7)
    assert ran.arguments["config"].seed == 4 and ran.arguments["resume"] is True
    assert command("train", "train.steps=8").status == 0
    assert (ran.arguments["config"].name, ran.arguments["config"].train.steps) == ("digits", 8)
    assert ran.arguments["resume"] is False
    (tmp_path / "tuned.yaml").write_text("kernels: reference")
    assert command("train", "train.steps=8", "--tuned", tmp_path / "tuned.yaml").status == 0
    assert (ran.arguments["config"].kernels, ran.arguments["config"].train.steps) == ("reference", 8)
    outcome.stopped_by = 15
    assert command("train").status == 143


def test_plan(command, record):
    made = record("unite_fast.planning.predict.make_plan", result="plan")
    printed = record("unite_fast.planning.report.lines", result=["a plan"])
    ended = command(
        *("plan", "imagenet256_l", "train.micro_batch=16", "--gpu", "h200", "--nodes", 3, "--gpus-per-node", 4),
        *("--price", 2.5, "--data", "raw"),
    )
    assert (ended.status, ended.out) == (0, "a plan\n")
    config, cluster, data = made.arguments.values()
    assert (config.name, config.train.micro_batch, data) == ("imagenet256_l", 16, "raw")
    assert (cluster.gpu.key, cluster.nodes, cluster.gpus_per_node) == ("h200", 3, 4)
    assert list(printed.arguments.values()) == ["plan", 2.5, []]


def test_plan_shows_what_was_measured_on_the_same_gpus(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"date": "2026-01-02", "commit": "abc1234", "recipe": "imagenet256_b", "card": "NVIDIA H200", "gpus": "8"}
    row |= {"settings": "", "images_per_s": "2640", "images_per_s_per_gpu": "330.0"}
    others = ({"gpus": "4"}, {"recipe": "digits"}, {"card": "NVIDIA B200"})
    lines = [",".join(row), *(",".join((row | other).values()) for other in ({}, *others))]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/bench.csv").write_text("\n".join(lines))
    out = command("plan", "imagenet256_b", "--gpu", "h200").out
    assert out.count("abc1234") == 1 and "330.0" in out
    (tmp_path / "runs/bench.csv").rename(tmp_path / "other.csv")
    assert "abc1234" not in command("plan", "imagenet256_b", "--gpu", "h200").out
    assert "330.0" in command("plan", "imagenet256_b", "--gpu", "h200", "--measured", "other.csv").out
    ended = command("plan", "imagenet256_b", "--measured", "none.csv")
    assert ended.status == 2 and "none.csv" in ended.err
    assert (
        "abc1234" not in command("plan", "imagenet256_b", "--gpu", "h200", "--nodes", 2, "--measured", "other.csv").out
    )


def test_shards(command, record, tmp_path, mentions):
    from unite_fast.data_pipeline.shards.parquet_files import Columns
    from unite_fast.data_pipeline.shards.write import Settings

    manifest = SimpleNamespace(samples=9, shards=[1, 2], format="cropped-jpeg", skipped=1)
    made = record("unite_fast.data_pipeline.shards.write.make_shards", result=manifest)
    ended = command(
        *("shards", "make", "source", tmp_path, "--format", "cropped-jpeg", "--image-size", 64, "--quality", 97),
        *("--seed", 5, "--per-shard", 6, "--split", "test", "--labels", "l.txt", "--workers", 3),
        *("--image-column", "img"),
    )
    assert ended.status == 0, ended.err
    source, out, settings, workers, split, labels, columns, _ = made.arguments.values()
    assert (source, out, workers, split, labels) == (Path("source"), tmp_path, 3, "test", Path("l.txt"))
    assert columns == Columns("img", "")
    assert tuple(vars(settings).values()) == tuple(vars(Settings("cropped-jpeg", 64, 97, 5, 6)).values())
    assert re.search(mentions(9, 2, "cropped-jpeg"), ended.out) and re.search(mentions(1, "skipped.log"), ended.out)


def test_verify(command, record):
    checked = record("unite_fast.data_pipeline.shards.verify.verify_shards", result=[])
    record("unite_fast.data_pipeline.shards.verify.unchecked", result=[])
    assert command("shards", "verify", "folder", "--workers", 3).status == 0
    assert list(checked.arguments.values()) == [Path("folder"), 3]
    checked.result = ["a fault"]
    ended = command("shards", "verify", "folder")
    assert (ended.status, ended.out) == (1, "a fault\n")


def test_inspect(command, record, tmp_path):
    inspected = record("unite_fast.data_pipeline.inspection.inspect_data", result=["a line"])
    out = tmp_path / "i.png"
    ended = command(
        *("inspect", "data", "--image-size", 32, "--split", "test", "--workers", 3, "--seconds", 0.5, "--seed", 6),
        *("--out", out),
    )
    assert (ended.status, ended.out) == (0, "a line\n")
    assert list(inspected.arguments.values()) == ["data", 32, "test", 3, 0.5, 6, out]


def test_export_and_info(command, record):
    exported = record("unite_fast.checkpoint.model_file.export_model")
    assert command("export", "run", "out.safetensors").status == 0
    assert list(exported.arguments.values())[:2] == [Path("run"), Path("out.safetensors")]
    described = record("unite_fast.checkpoint.model_file.describe", result="description")
    assert command("info", "run").out == "description\n"
    assert described.arguments["checkpoint"] == Path("run")


def test_import_official_and_export_official(command, record):
    read = record("unite_fast.interop.official.import_official")
    ended = command(
        *("import-official", "f.pt", "o.safetensors", "--weights", "model", "--decoder-heads", 3),
        *("--in-context-start", 2),
    )
    assert ended.status == 0, ended.err
    arguments = read.arguments
    assert list(arguments.values())[:2] == [Path("f.pt"), Path("o.safetensors")]
    assert (arguments["weights"], arguments["decoder_heads"], arguments["in_context_start"]) == ("model", 3, 2)
    written = record("unite_fast.interop.official.export_official")
    assert command("export-official", "run", "o.pt").status == 0
    assert list(written.arguments.values())[:2] == [Path("run"), Path("o.pt")]


def test_parity(command, record):
    ran = record("unite_fast.interop.parity.run", result=True)
    assert command("parity", "t.npz", "--backend", "native", "--device", "cpu").status == 0
    path, backend, device = ran.arguments.values()
    assert (path, backend, device.type) == (Path("t.npz"), "native", "cpu")
    ran.result = False
    assert command("parity", "t.npz").status == 1
    assert ran.arguments["backend"] == "reference"


def test_loading_a_model_sets_the_threads_of_its_run(monkeypatch):
    calls = []
    config = SimpleNamespace(train=SimpleNamespace(threads=3))
    monkeypatch.setattr(
        "unite_fast.load", lambda path, device: calls.append((path, str(device))) or SimpleNamespace(config=config)
    )
    monkeypatch.setattr("unite_fast.utils.device.use_threads", calls.append)
    options_module.load(Path("run"), "cpu")
    assert calls == [(Path("run"), "cpu"), 3]


def test_check_cluster(command, record, tmp_path):
    ran = record("unite_fast.cluster_check.run.check_cluster", result=2)
    ended = command("check-cluster", "fashion_mnist", "seed=4", "--folder", "runs/x", "--json", "found.json")
    assert (ended.status, ended.err) == (2, "")
    assert (ran.arguments["config"].name, ran.arguments["config"].seed) == ("fashion_mnist", 4)
    assert (ran.arguments["folder"], ran.arguments["out"]) == ("runs/x", Path("found.json"))
    (tmp_path / "tuned.yaml").write_text("kernels: reference\n")
    assert command("check-cluster", "train.steps=8", "--tuned", tmp_path / "tuned.yaml").status == 2
    config = ran.arguments["config"]
    assert (config.name, config.train.steps, config.kernels) == ("digits", 8, "reference")
    assert (ran.arguments["folder"], ran.arguments["out"]) == ("", None)


def test_bench(command, record, tmp_path):
    read = record("unite_fast.benchmarking.run.read_recipe", result=("config", ("a=1",)))
    ran, plotted = record("unite_fast.benchmarking.run.bench"), record("unite_fast.benchmarking.run.draw")
    ended = command(
        *("bench", "digits", "a=1", "--data", "photos", "--warmup", 3, "--steps", 7, "--seconds", 2.5, "--profile"),
        *("--tuned", "t.yaml", "--json", "--csv", "b.csv", "--plot", "p.png"),
    )
    assert (ended.status, ended.err) == (0, "")
    assert read.arguments == {"words": ["digits", "a=1"], "tuned": "t.yaml", "data": "photos"}
    assert ran.arguments == {
        "config": "config",
        "overrides": ("a=1",),
        "data": "photos",
        "warmup": 3,
        "steps": 7,
        "seconds": 2.5,
        "profile": True,
        "table": Path("b.csv"),
        "as_json": True,
    }
    assert plotted.arguments == {"table": Path("b.csv"), "out": Path("p.png")}


def test_tune(command, record):
    ran = record("unite_fast.benchmarking.run.tune")
    assert command("tune", "digits", "a=1", "--budget", 33, "--out", "t.yaml").status == 0
    assert ran.arguments == {"recipe": "digits", "overrides": ("a=1",), "budget": 33.0, "out": Path("t.yaml")}
