"""Import and export of the authors' checkpoints."""

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

import unite_fast
from unite_fast.checkpoint.model_file import load_model
from unite_fast.config import ModelConfig
from unite_fast.errors import UserError
from unite_fast.interop.names import COMPUTED, UNREAD, our_name, their_name
from unite_fast.interop.official import export_official, import_official, our_state, released_model, their_state
from unite_fast.interop.parity import relative_error
from unite_fast.utils.file_lock import lock_output

OPTIONS = dict(decoder_heads=2, in_context_start=1)
"""What the tensors of the small model do not determine."""


@pytest.fixture
def meta(released) -> dict:
    return released.new_meta("checkpoint")


@pytest.fixture
def theirs(released, meta) -> dict[str, Tensor]:
    return released.new_state(meta, size=32, seed=3)


@pytest.fixture
def save(tmp_path):
    """Writes a file as the authors do."""

    def write(content) -> Path:
        torch.save(content, tmp_path / "theirs.pt")
        return tmp_path / "theirs.pt"

    return write


def assert_refused(source: Path, *words: str, **options) -> None:
    out = source.with_name("out.safetensors")
    with pytest.raises(UserError) as error:
        import_official(source, out, **(OPTIONS | options))
    message = str(error.value)
    assert "\n" not in message and not out.exists()
    for word in words:
        assert word in message, message


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Same names, shapes, dtypes and values, except for a parameter that is never read and that we do not store."""
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    differing = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert differing <= {"encoder.t_embedder.special_time_emb"}


def test_their_state_is_the_official_checkpoint(official):
    assert_same(their_state(official.model(official.config())), official.below("state/"))


@pytest.mark.parametrize("changes", [{}, {"in_content_len": 0}, {"use_qknorm_encoder": False}])
def test_round_trip_through_files(released, save, tmp_path, changes):
    theirs = released.new_state(released.new_meta("trip", **changes), size=32, seed=4)
    averages = {name: w * 0.5 if w.is_floating_point() and our_name(name) else w for name, w in theirs.items()}
    averages["encoder.t_embedder.W"] = theirs["encoder.t_embedder.W"]
    ours, back = tmp_path / "run" / "ours.safetensors", tmp_path / "new" / "back.pt"

    import_official(save({"model": theirs, "ema": averages, "epoch": 3}), ours, **OPTIONS)
    export_official(ours, back)

    content = torch.load(back, weights_only=True)
    assert list(content) == ["model", "ema"]
    # An import takes one set of weights: the averages by default.
    released_tables = {name: tensor for name, tensor in averages.items() if name in COMPUTED}
    assert len(released_tables) == (4 if changes.get("in_content_len") == 0 else 6)
    for kind in content:
        for name, table in released_tables.items():
            torch.testing.assert_close(content[kind][name], table, rtol=0, atol=1e-6)
        assert_same(content[kind] | released_tables, averages | {n: content[kind][n] for n in ("encoder.pos_embed",)})
    assert [path.name for path in back.parent.iterdir()] == ["back.pt"]


def test_weights_and_averages_of_a_run_are_not_mixed_up(trained_folder, tmp_path):
    """Export and import, each kind under its own name."""
    run = load_model(trained_folder)
    assert any(not torch.equal(value, run.weights[name]) for name, value in run.averages.items())
    export_official(trained_folder, tmp_path / "back.pt")
    content = torch.load(tmp_path / "back.pt", weights_only=True)
    for kind, expected in (("model", run.weights), ("ema", run.averages)):
        for name, value in our_state(content[kind]).items():
            assert torch.equal(value, expected[name]), (kind, name)
        sizes = run.config.model
        options = dict(decoder_heads=sizes.decoder.heads, in_context_start=sizes.encoder.in_context_start)
        import_official(tmp_path / "back.pt", tmp_path / "in.safetensors", weights=kind, **options)
        imported = load_model(tmp_path / "in.safetensors").averages
        assert imported.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in imported.items()), kind


def test_an_imported_model_computes_the_same(released, meta, theirs, save, tmp_path):
    import_official(save(theirs), tmp_path / "ours.safetensors", **OPTIONS)
    ours = unite_fast.load(tmp_path / "ours.safetensors").network
    plain = released.Released(meta, theirs)
    inputs = released.new_inputs(meta, size=32, seed=5)
    images, registers, t = inputs["in/images_uint8"].float() / 255, inputs["tokenize/registers"], inputs["tokenize/t"]
    with torch.no_grad():
        z = plain.norm(plain.tokenize(images, registers, t))
        assert relative_error(ours.tokenize(images, registers, t), z) < 1e-5
        assert relative_error(ours.decode(z), plain.decode(z)) < 1e-5


def test_an_imported_model_has_weights_only(theirs, save, tmp_path):
    import_official(save(theirs), tmp_path / "ours.safetensors", **OPTIONS)
    saved = load_model(tmp_path / "ours.safetensors")
    assert (saved.step, saved.config.name) == (0, "theirs")
    assert (saved.config.data.source, saved.config.data.path) == ("folder", "")
    sampling = saved.config.sampling
    assert (sampling.solver, sampling.guidance, sampling.interval) == ("dopri5", 3.0, (0.1, 1.0))
    weights = our_state(theirs)
    assert saved.weights is saved.averages
    assert saved.weights.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in saved.weights.items())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_wrapped_models(theirs, save, tmp_path, prefix):
    wrapped = {prefix + name.replace("blocks.1.", "blocks.1._orig_mod."): value for name, value in theirs.items()}
    import_official(save({"ema": wrapped}), tmp_path / "ours.safetensors", **OPTIONS)
    network = unite_fast.load(tmp_path / "ours.safetensors").network
    assert_same(dict(our_state(their_state(network))), our_state(theirs))


def test_choice_of_weights(theirs, save, tmp_path):
    doubled = {name: w if name in (*COMPUTED, "encoder.t_embedder.W") else 2 * w for name, w in theirs.items()}
    content = {"model": doubled, "ema": theirs, "state_dict": doubled, "epoch": 3}
    for weights, factor in (("ema", 1), ("model", 2), ("state_dict", 2)):
        import_official(save(content), tmp_path / "ours.safetensors", weights=weights, **OPTIONS)
        bias = unite_fast.load(tmp_path / "ours.safetensors").network.decoder.pred.bias
        assert torch.equal(bias, factor * theirs["decoder.decoder_pred.bias"])
    assert_refused(save({"model": theirs, "optimizer": {"a": 1}, "epoch": 3}), "'ema'", "model, optimizer")
    assert_refused(save({"epoch": 3}), "'ema'")


def test_averages_without_the_fixed_frequencies(theirs, save, tmp_path):
    trained = {name: w for name, w in theirs.items() if name not in (*COMPUTED, *UNREAD, "encoder.t_embedder.W")}
    import_official(save({"model": theirs, "ema": trained}), tmp_path / "ours.safetensors", **OPTIONS)
    network = unite_fast.load(tmp_path / "ours.safetensors").network
    assert torch.equal(network.encoder.time_embed.frequencies, theirs["encoder.t_embedder.W"])
    assert_refused(save({"ema": trained}), "encoder.t_embedder.W")


def test_half_precision_files(theirs, save, tmp_path):
    import_official(save({name: w.bfloat16() for name, w in theirs.items()}), tmp_path / "ours.safetensors", **OPTIONS)
    network = unite_fast.load(tmp_path / "ours.safetensors").network
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_sizes_come_from_the_tensors(released, save, tmp_path):
    meta = released.new_meta(
        "sizes", decoder={"depth": 1, "hidden_size": 128, "mlp_size": 72}, num_classes=9, in_content_len=2
    )
    meta["encoder"] |= {"depth": 5, "hidden_size": 48, "num_heads": 3}
    import_official(save(released.new_state(meta, size=24, seed=0)), tmp_path / "ours.safetensors")
    model = load_model(tmp_path / "ours.safetensors").config.model
    assert (model.image_size, model.patch_size, model.latent_tokens, model.latent_channels) == (24, 8, 9, 6)
    assert model.num_classes == 9
    encoder, decoder = model.encoder, model.decoder
    assert (encoder.width, encoder.depth, encoder.heads, encoder.in_context_tokens) == (48, 5, 3, 2)
    assert (encoder.in_context_start, encoder.qk_norm) == (4, True)
    assert (decoder.width, decoder.depth, decoder.heads, decoder.mlp_width, decoder.embed_width) == (128, 1, 2, 72, 768)


def test_sizes_that_the_tensors_do_not_determine(theirs, save):
    assert_refused(save(theirs), "32", "64", "heads", decoder_heads=None)
    assert_refused(save(theirs), "heads (5)", decoder_heads=5)
    assert_refused(save(theirs), "in_context_start", in_context_start=4)


def test_invalid_files(tmp_path, theirs, save):
    assert_refused(tmp_path / "none.pt", "none.pt")
    assert_refused(tmp_path, str(tmp_path))
    text = tmp_path / "text.pt"
    text.write_text("hello")
    assert_refused(text, "text.pt")
    torn = save(theirs)
    torn.write_bytes(torn.read_bytes()[:5000])
    assert_refused(torn, torn.name)
    assert_refused(save([1, 2]), "list")
    assert_refused(save({}), "'ema'")


def test_files_with_code_are_not_run(theirs, save, tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    assert_refused(save({"model": theirs, "args": Code()}), "theirs.pt", "code")
    assert not (tmp_path / "ran").exists()
    assert_refused(save({"model": theirs, "args": argparse.Namespace(lr=1)}), "argparse.Namespace")


def test_missing_unknown_and_misshapen_tensors(theirs, save):
    def without(*names: str) -> dict[str, Tensor]:
        return {name: value for name, value in theirs.items() if name not in names}

    assert_refused(save(without("encoder.up_sample.weight")), "encoder.up_sample.weight")
    assert_refused(save(without("decoder.decoder_norm.bias")), "decoder.decoder_norm.bias")
    two = ("encoder.blocks.1.mlp.w3.bias", "encoder.blocks.2.norm1.weight")
    assert_refused(save(without(*two)), "encoder.blocks.1.mlp.w3.bias", "1 more")
    assert_refused(
        save(theirs | {"encoder.blocks.0.mlp.w4.weight": torch.ones(2)}),
        "encoder.blocks.0.mlp.w4.weight",
    )
    assert_refused(save({"ema": theirs | {"encoder.up_sample.bias": 3}}), "encoder.up_sample.bias", "int")
    assert_refused(save(theirs | {"up_sample_decoder.bias": torch.ones(7)}), "up_sample_decoder.bias", "[7]")
    assert_refused(save(theirs | {"latent_tokens": theirs["latent_tokens"][:, :7]}), "7 latent tokens")
    assert_refused(save(theirs | {"latent_tokens": theirs["latent_tokens"][0]}), "latent_tokens", "[16, 32]")
    table = "patch_embed.position_embeddings"
    assert_refused(save(theirs | {table: theirs[table] + 0.1}), table)
    assert_refused(save(theirs | {table: theirs[table][:, 1:]}), table, "[1, 16, 32]")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda w: w.to_sparse(), "sparse"),
        (lambda w: w.to_sparse_csr(), "sparse"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "qint8"),
        (lambda w: w.to("meta"), "meta"),
        (lambda w: w.long(), "int64"),
        (lambda w: w.bool(), "bool"),
        (lambda w: w.to(torch.complex64), "complex64"),
        (lambda w: torch.full_like(w, torch.nan), "finite"),
        (lambda w: torch.full_like(w, torch.inf), "finite"),
        (lambda w: torch.ones(1).expand(w.shape), "fewer numbers"),
        (lambda w: w.tolist(), "list"),
        (lambda w: "text", "str"),
        (lambda w: None, "NoneType"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_values_that_are_no_dense_finite_numbers(theirs, save, change, word):
    name = "encoder.up_sample.weight"
    assert_refused(save({"ema": theirs | {name: change(theirs[name])}}), name, word)


def test_sizes_that_a_file_claims_take_no_memory(theirs, save):
    """A few numbers can be shown as a tensor of any shape; as the model's weights it would have 2**50 numbers."""
    one = torch.ones(1)
    wide = {"encoder.up_sample.weight": one.expand(2**34, 16), "decoder.decoder_embed.weight": one.expand(2**30, 2**20)}
    assert_refused(save(theirs | wide), "fewer numbers")
    assert_refused(save(theirs | {"encoder.y_embedder.embedding_table.weight": one.expand(2**40, 32)}), "fewer numbers")
    blocks = {f"encoder.blocks.{i}.norm2.weight": torch.ones(32) for i in range(2, 4000)}
    assert_refused(save(theirs | blocks), "encoder.blocks")


def test_names_that_are_no_names_of_tensors(theirs, save):
    for key in (3, ("a",), "a\x1b[2J", "a\nb"):
        assert_refused(save({"ema": theirs | {key: torch.ones(1)}}), repr(key))
        assert_refused(save(theirs | {key: torch.ones(1)}), repr(key))


def test_a_pipe_is_no_file_of_weights(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    assert_refused(tmp_path / "pipe.pt", "pipe.pt")


def test_a_tensor_of_another_model(released, theirs, mentions):
    config = ModelConfig(image_size=32, patch_size=8)
    extra = theirs | {"encoder.blocks.99.norm1.weight": torch.ones(32)}
    with pytest.raises(UserError, match=mentions("theirs.pt", "encoder.blocks.99.norm1.weight")):
        released_model(config, extra, "theirs.pt")


def test_a_failed_import_keeps_the_old_file(theirs, save, tmp_path):
    out = tmp_path / "ours.safetensors"
    import_official(save(theirs), out, **OPTIONS)
    before = out.read_bytes()
    with pytest.raises(UserError):
        import_official(save(theirs | {"spare": torch.ones(2)}), out, **OPTIONS)
    assert out.read_bytes() == before


def test_export_errors(theirs, save, tmp_path, mentions):
    ours = tmp_path / "ours.safetensors"
    with pytest.raises(UserError, match=mentions(ours)):
        export_official(ours, tmp_path / "back.pt")
    import_official(save(theirs), ours, **OPTIONS)
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(UserError, match=mentions(tmp_path / "folder.pt")):
        export_official(ours, tmp_path / "folder.pt")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=mentions(tmp_path / "file" / "back.pt")):
        export_official(ours, tmp_path / "file" / "back.pt")
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", ["theirs.pt", "pictures.zip"])
def test_export_replaces_only_what_it_wrote(trained_folder, tmp_path, mentions, name):
    """A file of torch.save begins like every zip archive."""
    if name.endswith(".pt"):
        torch.save({"model": torch.zeros(1)}, tmp_path / name)
    else:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("cat.png", b"")
    content = (tmp_path / name).read_bytes()
    with pytest.raises(UserError, match=mentions(tmp_path / name, "in the way")):
        export_official(trained_folder, tmp_path / name)
    assert (tmp_path / name).read_bytes() == content
    for _ in range(2):
        export_official(trained_folder, tmp_path / "ours.pt")


@pytest.mark.parametrize("change", ["twice", "large"])
def test_what_would_import_as_another_model_is_refused(trained_folder, tmp_path, mentions, change):
    export_official(trained_folder, tmp_path / "theirs.pt")
    state = torch.load(tmp_path / "theirs.pt")["ema"]
    name = "encoder.up_sample.weight"
    if change == "twice":
        state[f"module.{name}"] = state[name] * 0
    else:
        state[name] = state[name].double() + 1e300
    torch.save({"ema": state}, tmp_path / "theirs.pt")
    with pytest.raises(UserError, match=mentions(tmp_path / "theirs.pt", name)):
        import_official(tmp_path / "theirs.pt", tmp_path / "ours.safetensors", decoder_heads=1, in_context_start=1)


def test_names_translate_both_ways(official, mentions):
    named = {name: our_name(name) for name in official.below("state/")}
    translated = {theirs: ours for theirs, ours in named.items() if ours}
    assert {their_name(ours) for ours in translated.values()} == set(translated)
    assert set(named) - set(translated) == {*COMPUTED, *UNREAD}
    with pytest.raises(UserError, match=mentions("encoder.blocks.0.attn.rotary")):
        our_name("encoder.blocks.0.attn.rotary")


def test_an_export_is_never_its_source_nor_a_foreign_file(command, trained_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(trained_folder, run, symlinks=True)
    assert command("export", run, "m.safetensors").status == 0
    shard = run / "checkpoints" / "step_00000020" / "shard_00001.safetensors"
    os.link("m.safetensors", "hard.safetensors")
    os.symlink("m.safetensors", "soft.safetensors")
    os.link(shard, "shard.safetensors")
    Path("text.safetensors").write_text("mine")
    Path("text.pt").write_text("mine")
    before = {path: path.read_bytes() for path in (Path("m.safetensors"), shard, Path("text.safetensors"))}
    for name in ("export", "export-official", "import-official"):
        for out in ("m.safetensors", "hard.safetensors", "soft.safetensors"):
            command(name, "m.safetensors", out).error(out, "reads")
    for name in ("export", "export-official"):
        for out in (shard, shard.parent / "new.safetensors", run / "checkpoints" / "latest" / shard.name):
            command(name, run, out).error(out, "reads")
        command(name, run, "shard.safetensors").error("shard.safetensors", "reads")
        out = "text.pt" if name == "export-official" else "text.safetensors"
        command(name, trained_folder, out).error(out, "in the way")
    # The shard of another run is not a model file.
    command("export", trained_folder, shard).error(shard, "in the way")
    assert all(path.read_bytes() == content for path, content in before.items())
    # Exports may be replaced.
    for name, out in (("export", "m.safetensors"), ("export-official", "m.pt"), ("export-official", "m.pt")):
        assert command(name, run, out).status == 0
    assert not [name for name in os.listdir() if name.startswith(".")]


@pytest.mark.parametrize("name", ["export", "export-official"])
def test_an_export_into_a_folder_locks_nothing(command, trained_folder, tmp_path, name):
    """A lock is a file beside the output; beside a folder, it would be in a folder that the user did not name."""
    folder = tmp_path / "home.safetensors"
    folder.mkdir()
    command(name, trained_folder, folder).error(folder, "in the way", "folder")
    assert os.listdir(tmp_path) == [folder.name] and not os.listdir(folder)


def test_an_export_has_one_writer(command, trained_folder, tmp_path):
    with lock_output(tmp_path / "m.safetensors"):
        # POSIX locks are per process, so another one tries.
        code = "import sys; from unite_fast.cli import main; main()"
        ended = subprocess.run(
            [sys.executable, "-c", code, "export", str(trained_folder), str(tmp_path / "m.safetensors")],
            capture_output=True,
            text=True,
        )
    assert ended.returncode == 2 and "being written" in ended.stderr and len(ended.stderr.splitlines()) == 1
