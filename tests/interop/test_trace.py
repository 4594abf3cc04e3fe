"""Invalid and unsupported traces must be refused in one line that names the reason."""

import json
import zipfile

import numpy as np
import pytest

from unite_fast.errors import UserError
from unite_fast.interop.parity import compare
from unite_fast.interop.trace import Trace


def assert_refused(path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        compare(Trace(path))
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_missing_file(tmp_path):
    assert_refused(tmp_path / "none.npz", "none.npz")
    assert_refused(tmp_path, str(tmp_path))


def test_not_a_zip(tmp_path):
    path = tmp_path / "trace.npz"
    path.write_text("hello")
    assert_refused(path, str(path), ".npz file")


def test_a_lone_array(tmp_path):
    np.save(tmp_path / "trace.npy", np.zeros(3))
    assert_refused(tmp_path / "trace.npy", "trace.npy", ".npz file")


def test_another_zip(tmp_path):
    path = tmp_path / "trace.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")
    assert_refused(path, "meta_json")


def test_torn_file(small, write_trace):
    path = write_trace(small)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert_refused(path, str(path))


def test_damaged_file(small, write_trace):
    path = write_trace(small)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    assert_refused(path, str(path))


def test_pickles_are_not_read(write_trace):
    assert_refused(write_trace({"meta_json": np.array([{"a": 1}], dtype=object)}), "pickle")


@pytest.mark.parametrize("text", [b"{not json", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN}', b'{"a": 1, "a": 2}'])
def test_meta_that_is_not_json(small, write_trace, text):
    assert_refused(write_trace(small | {"meta_json": np.frombuffer(text, np.uint8)}), "meta_json", "JSON")


@pytest.mark.parametrize("meta", [[], 3, {"config": {}}, {"config": None}])
def test_meta_of_another_format(small, write_trace, meta):
    assert_refused(write_trace(small, meta), "format")


@pytest.mark.parametrize(
    "name",
    [
        "in/images_uint8",
        "in/labels",
        "tokenize/t",
        "tokenize/z_normed",
        "sample/noise",
        "step2/flow_noise",
        "grad0norm/",
        "final_norm/",
        "final_head/latent_tokens",
        "state/up_sample_decoder.weight",
        "state/encoder.blocks.1.attn.k_norm.weight",
    ],
)
def test_missing_arrays(small, write_trace, name):
    gone = name if name.endswith("/") else name + "\0"
    arrays = {own: array for own, array in small.items() if not (own + "\0").startswith(gone)}
    assert_refused(write_trace(arrays), name.removeprefix("state/"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("in/images_uint8", lambda a: a.astype(np.float32)),
        ("in/images_uint8", lambda a: a[:, :1]),
        ("in/labels", lambda a: a + 100),
        ("in/labels", lambda a: a[:1]),
        ("denoise/xt", lambda a: a[:1]),
        ("denoise/x_pred", lambda a: a[:1]),
        ("step0/flow_t", lambda a: a[:2]),
        ("tokenize/t", lambda a: a.astype(str)),
        ("grad0/latent_tokens", lambda a: a[0]),
        ("in/labels", lambda a: a + 0.5),
        ("tokenize/registers", lambda a: a.astype(np.float16)),
        ("denoise/t", lambda a: a.astype(np.float64)),
        ("sample/noise", lambda a: a.astype(np.int64)),
        ("step0/registers", lambda a: a.astype(np.float16)),
        ("step0/flow_noise", lambda a: a * np.float32("nan")),
        ("step0/label_drop", lambda a: a + 0.5),
        ("step0/decoder_noise_mask", lambda a: a.astype(np.int64) + 1),
    ],
)
def test_wrong_arrays(small, write_trace, name, change):
    assert_refused(write_trace(small | {name: change(small[name])}), name)


def test_misshapen_and_unknown_weights(small, write_trace):
    name = "state/encoder.blocks.0.mlp.w3.weight"
    assert_refused(write_trace(small | {name: small[name][:, 1:]}), "encoder.blocks.0.mlp.w3.weight", "[32, 84]")
    assert_refused(
        write_trace(small | {"state/encoder.blocks.9.norm1.weight": np.ones(32, np.float32)}), "encoder.blocks.9.norm1"
    )
    assert_refused(write_trace(small | {"state/spare": np.ones(3, np.float32)}), "spare")
    assert_refused(write_trace(small | {"final_norm/spare": np.float32(1)}), "spare")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("config.timestep_shift_mode", "auto"),
        ("sampling.method", "rk4"),
        ("sampling.rtol", 1e-5),
        ("sampling.cfg_norm_order", "norm_last"),
        ("optim.adamw.weight_decay", 0.1),
        ("optim.muon.weight_decay", 0.1),
        ("optim.muon.adjust_lr_fn", "original"),
        ("optim.muon.eps", 1e-7),
        ("encoder.num_heads", 5),
        ("encoder.num_heads", "two"),
        ("losses", []),
        ("losses", [{"lr": 0.0, "l1": 1.0, "flow": 1.0, "grad_norm": 1.0}]),
        *(
            ("losses", [{"lr": 0.1, "l1": 1.0, "flow": 1.0, "total": 2.0, "grad_norm": 1.0} | change])
            for change in ({"l1": "1"}, {"lr": -1}, {"flow": None}, {"grad_norm": 0.0}, {"total": 1e300}, {"l1": [1]})
        ),
        ("sampling.num_time_points", 10**12),
        ("muon_params", [3]),
        ("muon_params", "encoder"),
        ("adamw_params", [None]),
    ],
)
def test_unsupported_settings(small, write_trace, place, value):
    meta = json.loads(bytes(small["meta_json"]))
    meta["sampling"]["method"] = "dopri5"
    *groups, key = place.split(".")
    holder = meta
    for group in groups:
        holder = holder[group]
    holder[key] = value
    ours = {"cfg_norm_order": "order", "num_heads": "heads", "losses": "losses", "num_time_points": "steps"}.get(
        key, place
    )
    assert_refused(write_trace(small, meta), ours)
