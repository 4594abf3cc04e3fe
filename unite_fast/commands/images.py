"""Commands that generate and reconstruct images and molecules."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unite_fast.commands import options

if TYPE_CHECKING:
    from torch import Tensor

    from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
    from unite_fast.sampling.molecules import TrainedMolecules

app = typer.Typer()

IMAGE_COPIES = 4
"""Copies of its images that `sample` holds in memory at once: parts, joined, the grid, its file."""


@app.command()
def sample(
    checkpoint: options.Checkpoint,
    classes: options.Classes = "",
    count: Annotated[int, typer.Option(min=1, help="number of images")] = 80,
    guidance: options.Guidance = None,
    interval: options.Interval = None,
    solver: options.Solver = None,
    steps: options.Steps = None,
    seed: options.Seed = 0,
    batch: options.Batch = 64,
    device: options.Device = "auto",
    out: Annotated[
        Path,
        typer.Option(help="a .png (one grid), .npz (arr_0, uint8 NHWC) or folder; molecules: .png, .xyz, .sdf, .npz"),
    ] = Path("samples.png"),
) -> None:
    """Generate images or molecules with the EMA weights.

    Examples:

    `unite-fast sample runs/digits --classes 7 --count 20 --guidance 2 --out sevens.png`

    `unite-fast sample runs/qm9_tiny --count 24 --classes 15,17 --out fifteen_or_seventeen_atoms.png`
    """
    from unite_fast.config import check_count
    from unite_fast.errors import require
    from unite_fast.sampling.molecules import TrainedMolecules
    from unite_fast.sampling.sampler import choose_labels
    from unite_fast.utils.device import host_memory
    from unite_fast.utils.files import check_npz
    from unite_fast.utils.images import SAMPLES, check_no_others, save_images

    cycle = options.parse_classes(classes)
    changes = options.sampling_changes(guidance, interval, solver, steps)
    check_count("--count", count)
    model = options.load(checkpoint, device)
    if isinstance(model, TrainedMolecules):
        check_molecules_out(out, checkpoint)
        molecules = generate_with_progress(model, choose_sizes(model, cycle, count, seed), seed, batch, changes)
        save_molecules(molecules, out)
        typer.echo(f"{len(molecules)} molecules in {out}")
        return
    options.check_out(out, (".png", ".npz", ""), checkpoint)
    if out.suffix == ".npz":
        check_npz(out, SAMPLES)
    needed = IMAGE_COPIES * count * 3 * model.config.model.image_size**2
    require(
        needed <= host_memory(),
        f"--count {count} images take {needed / 1e9:,.0f} GB, and this machine has {host_memory() / 1e9:,.0f} GB of "
        "memory: use unite-fast generate, which writes them one batch after another",
    )
    labels = choose_labels(cycle, count, model.config.model.num_classes)  # takes memory as well
    check_no_others(out, labels)
    images = generate_with_progress(model, labels, seed, batch, changes)
    save_images(images, labels, out, columns=10)
    typer.echo(f"{len(images)} images in {out}")


@app.command()
def generate(
    checkpoint: options.Checkpoint,
    out: Annotated[
        Path,
        typer.Option(help="an .npz (arr_0 uint8 NHWC, arr_1 classes) or a folder of PNGs; molecules: .xyz, .sdf, .npz"),
    ],
    # Two names: torchrun takes --num for an abbreviation of one of its own options.
    num: Annotated[int, typer.Option("--num", "--count", help="number of images")] = 50_000,
    classes: options.Classes = "",
    guidance: options.Guidance = None,
    interval: options.Interval = None,
    solver: options.Solver = None,
    steps: options.Steps = None,
    seed: options.Seed = 0,
    batch: options.Batch = 64,
    precision: options.Precision = None,
    compile: options.Compile = None,
    device: options.Device = "auto",
) -> None:
    """Generate many images or molecules with the EMA weights, on one process or several under torchrun.

    Sample i depends only on the seed, i and its class. If a run is interrupted, the same command resumes it.

    Examples:

    `unite-fast generate runs/imagenet256_b --num 50000 --out samples.npz`

    `torchrun --nproc-per-node 8 -m unite_fast generate runs/imagenet256_b --count 50000 --out samples.npz`

    `unite-fast generate runs/qm9_s --count 10000 --out molecules.sdf`
    """
    from unite_fast.checkpoint.folders import checkpoint_files
    from unite_fast.distributed.launch import ranks_of_torchrun
    from unite_fast.evaluation.molecules.perception import bonds_of
    from unite_fast.sampling.distributed_sampler import Generation
    from unite_fast.sampling.molecules import TrainedMolecules
    from unite_fast.sampling.sample_writer import write_samples
    from unite_fast.sampling.sampler import choose_labels
    from unite_fast.utils.device import choose_device
    from unite_fast.utils.files import check_not_read

    changes = options.sampling_changes(guidance, interval, solver, steps)
    cycle = options.parse_classes(classes)
    with ranks_of_torchrun(choose_device(device)) as ranks:
        model = options.load(checkpoint, device)
        if isinstance(model, TrainedMolecules):
            check_bonds_known(out)
            labels = choose_sizes(model, cycle, num, seed)
        else:
            labels = choose_labels(cycle, num, model.config.model.num_classes)
        how: tuple[str, bool] = model.precision_and_compile(precision, compile)
        generation = Generation(labels, model.sampling_config(**changes), seed, batch, *how)
        check_not_read(out, checkpoint_files(checkpoint))
        manifest = write_samples(model, generation, out, ranks, bonds_of)
    if ranks.main:
        typer.echo(f"{num} {model.config.model.modality} in {out}, their settings in {manifest}")


@app.command()
def reconstruct(
    checkpoint: options.Checkpoint,
    images: Annotated[list[Path], typer.Argument(metavar="FILES...", help="image files, or .xyz, .sdf, .npz files")],
    device: options.Device = "auto",
    out: Annotated[
        Path, typer.Option(help="a .png: originals above reconstructions; of molecules also .xyz, .sdf or .npz")
    ] = Path("reconstructions.png"),
) -> None:
    """Encode and decode images or molecules, and print the PSNR or RMSD of each.

    Examples:

    `unite-fast reconstruct runs/imagenet cat.jpg dog.png --out pets.png`

    `unite-fast reconstruct runs/qm9_tiny caffeine.xyz --out copies.sdf`
    """
    from unite_fast.data_pipeline.image_folder import read_images
    from unite_fast.evaluation.metrics import psnr
    from unite_fast.sampling.molecules import TrainedMolecules
    from unite_fast.utils.images import save_pairs

    model = options.load(checkpoint, device)
    if isinstance(model, TrainedMolecules):
        check_molecules_out(out, checkpoint, *images)
        reconstruct_molecules(model, images, out)
        return
    options.check_out(out, (".png",), checkpoint, *images)
    originals = read_images(images, model.config.model.image_size)
    reconstructions = model.reconstruct(originals)
    for path, decibels in zip(images, psnr(originals, reconstructions), strict=True):
        typer.echo(f"{path}: {decibels:.2f} dB")
    save_pairs(originals, reconstructions, out)
    typer.echo(f"{len(images)} pairs in {out}")


def generate_with_progress(model: Any, labels: "Tensor", seed: int, batch: int, settings: dict) -> Any:
    """`generate` of a model of images or molecules, with a progress bar; `settings` are its sampling settings."""
    import torch

    from unite_fast.config import check_seed_and_batch
    from unite_fast.data_pipeline.molecules.molecule_set import MoleculeSet
    from unite_fast.utils.progress import track

    check_seed_and_batch(seed, batch)
    starts = range(0, len(labels), batch)
    parts = [
        model.generate(labels[start : start + batch], seed, batch, first=start, **settings)
        for start in track(starts, len(starts), "generating")
    ]
    return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else MoleculeSet.join(parts)


def check_molecules_out(out: Path, checkpoint: Path, *others: Path) -> None:
    """Check an output of molecules before the work; see `options.check_out`."""
    from unite_fast.data_pipeline.molecules.write import MOLECULE_FILES

    options.check_out(out, (".png", *MOLECULE_FILES), checkpoint, *others)
    check_bonds_known(out)


def check_bonds_known(out: Path) -> None:
    """Check that what perceives the bonds in a file of molecules, or a picture of them, is installed."""
    from unite_fast.evaluation.molecules.perception import rdkit

    if out.suffix in (".png", ".sdf"):
        rdkit("Chem")


def choose_sizes(model: "TrainedMolecules", cycle: list[int], count: int, seed: int) -> "Tensor":
    """Numbers of atoms: those of `cycle` in turn, or if it is empty drawn as in the training molecules."""
    from unite_fast.config import check_count
    from unite_fast.sampling.sampler import choose_labels

    check_count("the number of molecules", count)
    if not cycle:
        return model.draw_sizes(count, seed)
    model.check_sizes(cycle)
    return choose_labels(cycle, count, model.config.model.num_classes)


def save_molecules(molecules: "MoleculeSet", out: Path) -> None:
    """Save molecules as one PNG grid, or as a file of molecules."""
    from unite_fast.data_pipeline.molecules.write import write_molecules
    from unite_fast.evaluation.molecules.perception import bonds_of
    from unite_fast.evaluation.molecules.pictures import molecule_grid
    from unite_fast.utils.images import save_png

    if out.suffix == ".png":
        save_png(molecule_grid(molecules, columns=8), out)
    else:
        write_molecules(out, molecules, bonds=bonds_of)


def reconstruct_molecules(model: "TrainedMolecules", paths: list[Path], out: Path) -> None:
    from unite_fast.commands.molecules import left_out_lines
    from unite_fast.data_pipeline.molecules.import_files import import_files
    from unite_fast.evaluation.molecules.alignment import rmsd_of_sets
    from unite_fast.evaluation.molecules.pictures import molecule_pairs
    from unite_fast.evaluation.molecules.scores import same_elements
    from unite_fast.utils.images import save_png

    originals, left_out = import_files(paths)
    copies = model.reconstruct(originals)
    for row, (rmsd, same) in enumerate(
        zip(rmsd_of_sets(originals, copies), same_elements(originals, copies), strict=True)
    ):
        typer.echo(f"molecule {row}: RMSD {rmsd:.3f} A, elements {'right' if same else 'wrong'}")
    for line in left_out_lines(left_out):
        typer.echo(line)
    if out.suffix == ".png":
        save_png(molecule_pairs(originals, copies, min(8, len(originals))), out)
    else:
        save_molecules(copies, out)
    typer.echo(f"{len(originals)} molecules in {out}")
