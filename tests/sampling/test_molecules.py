"""A trained model of molecules: sizes, noise, latents. tests/training/test_molecule_runs.py has one of a run."""

import dataclasses

import numpy as np
import pytest
import torch

import unite_fast
from unite_fast.checkpoint.model_file import save_model
from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
from unite_fast.data_pipeline.molecules.set_file import read_set
from unite_fast.errors import UserError
from unite_fast.randomness import Philox, Stream
from unite_fast.sampling import sampler
from unite_fast.sampling.molecules import TrainedMolecules, draw_sizes, encode, slerp, unpack
from unite_fast.sampling.pipeline import TrainedUNITE


@pytest.fixture(scope="module")
def model(molecule_file) -> TrainedMolecules:
    return unite_fast.load(molecule_file)


@pytest.fixture(scope="module")
def molecules(tiny_molecules) -> MoleculeSet:
    whole = read_set(tiny_molecules[0].removeprefix("data.path="))
    return whole.take(np.arange(0, 200, 29))


def test_a_file_loads_as_its_own_kind(molecule_file, tiny_config, tiny_model, tmp_path, mentions):
    of_images = tmp_path / "images.safetensors"
    save_model(of_images, tiny_config, 1, tiny_model.state_dict())
    assert isinstance(TrainedMolecules.load(molecule_file), TrainedMolecules)
    with pytest.raises(UserError, match=mentions(molecule_file, "molecules")):
        TrainedUNITE.load(molecule_file)
    with pytest.raises(UserError, match=mentions(of_images, "images")):
        TrainedMolecules.load(of_images)


def test_sizes_are_drawn_by_inverse_cdf_from_the_uniform_numbers_of_their_stream():
    counts = torch.zeros(33)
    counts[[3, 9, 29]] = torch.tensor([1.0, 2.0, 5.0])
    uniform = Philox(7, 0, torch.arange(4, 2004)).uniform(Stream.MOLECULE_SIZE).tolist()
    expected = [3 if u * 8 < 1 else 9 if u * 8 < 3 else 29 for u in uniform]
    assert draw_sizes(counts, 2000, 7, first=4).tolist() == expected
    assert set(expected) == {3, 9, 29}


def test_a_model_without_sizes_cannot_draw_them():
    with pytest.raises(UserError, match="sizes"):
        draw_sizes(torch.zeros(33), 5, 0)


def test_generation_is_the_samplers_with_the_recipes_settings_or_others(model):
    sizes = torch.tensor([5, 12, 8])
    changed = model.config.sampling.changed(steps=3)
    for settings, config in (({}, model.config.sampling), ({"steps": 3}, changed)):
        made = model.generate(sizes, seed=2, first=6, **settings)
        atoms = sampler.sample_images(model.network, sizes, config, 2, first=6)
        assert (made.positions == atoms[..., 1:].numpy()).all()
    assert not np.allclose(made.positions, model.generate(sizes, seed=2, first=6).positions, atol=1e-3)


def test_unpacking_numbers_the_elements_of_the_model_and_empties_pads():
    atoms = torch.tensor([[[0.0, 1, 2, 3], [2, 4, 5, 6], [1, 9, 9, 9]]])
    one = unpack(atoms, torch.tensor([2]), ["C", "N", "H"])
    assert one.numbers.tolist() == [[6, 1, 0]] and one.numbers.dtype == np.uint8
    assert one.positions[0, :2].tolist() == [[1, 2, 3], [4, 5, 6]] and one.sizes.tolist() == [2]


def test_latents_do_not_depend_on_the_batch_and_depend_on_seed_and_number(model, molecules):
    whole = model.encode(molecules, seed=3)
    torch.testing.assert_close(model.encode(molecules, seed=3, batch=2), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.encode(molecules.take([4]), seed=3, first=4)[0], whole[4], rtol=0, atol=1e-5)
    assert not torch.allclose(model.encode(molecules, seed=4), whole, atol=1e-3)
    real = torch.arange(32) < torch.from_numpy(molecules.sizes)[:, None]
    assert (whole[~real] == 0).all()
    torch.testing.assert_close(whole[real].square().mean(-1), torch.ones(int(real.sum())), rtol=1e-2, atol=0)


def test_encoding_is_the_tokenizer_at_time_zero(model, molecules):
    one = molecules.take([2])
    size = int(one.sizes[0])
    elements = [model.symbols.index({1: "H", 6: "C", 7: "N", 8: "O", 9: "F"}[n]) for n in one.numbers[0, :size]]
    atoms = torch.cat((torch.tensor(elements)[:, None].float(), torch.from_numpy(one.positions[0, :size])), dim=1)
    registers = Philox(5, 0, torch.tensor([0])).normal(Stream.REGISTERS, (size, 16))
    expected = model.network.tokenize(atoms[None], registers, torch.zeros(1))
    torch.testing.assert_close(encode(model.network, one, 5)[:, :size], expected, rtol=0, atol=1e-5)


def test_decoding_does_not_depend_on_the_batch_and_centres(model, molecules):
    latents = model.encode(molecules)
    whole = model.decode(latents, molecules.sizes)
    parts = model.decode(latents, molecules.sizes, batch=3)
    assert (whole.numbers == parts.numbers).all()
    np.testing.assert_allclose(whole.positions, parts.positions, atol=1e-4)
    for row, size in enumerate(molecules.sizes):
        np.testing.assert_allclose(whole.positions[row, :size].mean(0), 0, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "tokens"),
    [
        (lambda m: m.generate([0]), ("[0]", "1 to 32")),
        (lambda m: m.generate([33]), ("[33]", "1 to 32")),
        (lambda m: m.generate([]), ("sizes",)),
        (lambda m: m.generate([[3]]), ("sizes",)),
        (lambda m: m.generate([3], seed=-1), ("seed",)),
        (lambda m: m.generate([3], batch=0), ("batch",)),
        (lambda m: m.generate([3], guidance=2.0), ("guidance", "molecules")),
        (lambda m: m.generate([3], solver="rk4"), ("sampling.solver",)),
        (lambda m: m.draw_sizes(0), ("number of molecules", 0)),
        (lambda m: m.decode(torch.zeros(1, 5, 16), [5]), ("[1, 32, 16]", "[1, 5, 16]")),
        (lambda m: m.decode(torch.zeros(2, 32, 16), [5]), ("[1, 32, 16]",)),
        (lambda m: m.decode(torch.zeros(0, 32, 16), []), ("molecule",)),
        (lambda m: m.decode(torch.zeros(1, 32, 16), [40]), ("[40]",)),
        (lambda m: m.decode(torch.full((1, 32, 16), torch.nan), [4]), ("finite",)),
    ],
)
def test_what_a_model_cannot_do_is_refused(call, tokens, model):
    with pytest.raises(UserError) as refusal:
        call(model)
    assert all(str(token) in str(refusal.value) for token in tokens), refusal.value


def test_molecules_that_a_model_does_not_know_are_refused(model, molecules):
    sulphur = dataclasses.replace(molecules.take([0]), numbers=np.where(molecules.numbers[:1] == 6, 16, 1))
    with pytest.raises(UserError, match=r"\bS\b"):
        model.encode(sulphur)
    size = 40
    large = MoleculeSet.of(np.ones((1, size), np.uint8), np.random.RandomState(0).randn(1, size, 3), [size])
    with pytest.raises(UserError, match=r"40 atoms.*32"):
        model.reconstruct(large)


def test_an_arc_keeps_the_norm_and_meets_both_ends():
    start, end = (torch.randn(6, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    start, end = 4 * start / start.norm(dim=-1, keepdim=True), 4 * end / end.norm(dim=-1, keepdim=True)
    path = slerp(start, end, torch.linspace(0, 1, 5)[:, None, None])
    torch.testing.assert_close(path.norm(dim=-1), torch.full((5, 6), 4.0))
    torch.testing.assert_close(path[0], start)
    torch.testing.assert_close(path[-1], end)
    middle = (start + end) / (start + end).norm(dim=-1, keepdim=True) * 4
    torch.testing.assert_close(path[2], middle)
    torch.testing.assert_close(slerp(start, start, torch.tensor([[[0.3]]]))[0], start, rtol=1e-3, atol=1e-3)


def test_interpolation_needs_two_molecules_of_one_size(model, molecules):
    pair = molecules.take([0, 0])
    assert len(model.interpolate(pair, 3)) == 3
    for wrong in (molecules.take([0]), molecules.take([0, len(molecules) - 1])):
        with pytest.raises(UserError, match="two molecules"):
            model.interpolate(wrong, 3)
    with pytest.raises(UserError, match="steps"):
        model.interpolate(pair, 1)
