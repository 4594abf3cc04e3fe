"""Every source file has a test file of the same name, or a line here with the tests that cover it."""

from pathlib import Path

from unite_fast.kernels.registry import OPS

ROOT = Path(__file__).parents[1]
COVERED_BY = {
    "data_pipeline/readers.py": ("data_pipeline/test_loader.py", "data_pipeline/test_pinning.py"),
    "data_pipeline/shards/manifest.py": ("data_pipeline/shards/test_source.py", "data_pipeline/shards/test_write.py"),
    "data_pipeline/shards/tar_contents.py": ("data_pipeline/shards/test_tar_files.py",),
    "data_pipeline/shards/tar_members.py": ("data_pipeline/shards/test_tar_files.py",),
    "data_pipeline/shards/webdataset_samples.py": ("data_pipeline/shards/test_tar_files.py",),
    "data_pipeline/shards/verify.py": ("data_pipeline/shards/test_write.py", "data_pipeline/shards/test_source.py"),
    "kernels/flash.py": ("kernels/test_attention_backends.py",),
    "kernels/matmul.py": ("kernels/test_linear.py",),
    "kernels/norm_linear.py": ("kernels/test_linear.py",),
    "kernels/registry.py": ("kernels/test_fused_op.py", "kernels/test_fakes.py", "benchmarks/test_traffic.py"),
    "kernels/tensors.py": ("kernels/test_fused_op.py",),
    "kernels/triton_kernels/layer_norm.py": ("kernels/test_linear.py",),
    "kernels/triton_kernels/optimizer.py": ("optim/test_fused_step.py", "planning/test_predict.py"),
    "kernels/triton_kernels/rows.py": ("kernels/test_adaln.py", "kernels/test_linear.py"),
    "kernels/triton_kernels/sums.py": ("kernels/test_adaln.py", "kernels/test_qk_norm_rope.py"),
    "unite_fast/benchmarking/candidate.py": ("benchmarking/test_tune.py",),
    "unite_fast/benchmarking/figures.py": ("commands/test_bench.py",),
    "unite_fast/benchmarking/machine.py": ("commands/test_bench.py",),
    "unite_fast/benchmarking/measure.py": ("commands/test_bench.py",),
    "unite_fast/benchmarking/plot.py": ("commands/test_bench.py",),
    "unite_fast/benchmarking/matmul_rate.py": ("commands/test_bench.py",),
    "unite_fast/benchmarking/progress.py": ("commands/test_bench.py",),
    "unite_fast/benchmarking/run.py": ("commands/test_bench.py", "commands/test_tune.py"),
    "unite_fast/benchmarking/top_kernels.py": ("commands/test_bench.py",),
    "unite_fast/benchmarking/tuned_file.py": ("benchmarking/test_tune.py",),
    "unite_fast/cluster_check/records.py": ("cluster_check/test_findings.py", "cluster_check/test_report.py"),
    "unite_fast/commands/checkpoints.py": ("commands/test_forwarding.py", "interop/test_official.py"),
    "unite_fast/commands/cluster.py": ("commands/test_forwarding.py", "cluster_check/test_run.py"),
    "unite_fast/commands/data.py": ("commands/test_forwarding.py", "data_pipeline/shards/test_write.py"),
    "unite_fast/commands/evaluation.py": ("commands/test_forwarding.py", "evaluation/test_commands.py"),
    "unite_fast/commands/gallery.py": ("commands/test_forwarding.py", "evaluation/test_gallery.py"),
    "unite_fast/commands/guidance.py": ("commands/test_forwarding.py", "evaluation/test_guidance_search.py"),
    "unite_fast/commands/images.py": ("commands/test_forwarding.py", "test_cli.py"),
    "unite_fast/commands/planning.py": ("commands/test_forwarding.py", "planning/test_predict.py"),
    "unite_fast/commands/training.py": ("commands/test_forwarding.py", "test_cli.py"),
    "unite_fast/evaluation/batches.py": ("evaluation/test_evaluate.py", "evaluation/test_evaluator.py"),
    "unite_fast/evaluation/features.py": ("evaluation/test_inception.py", "evaluation/test_pixel_features.py"),
    "unite_fast/evaluation/gallery_page.py": ("evaluation/test_gallery.py",),
    "unite_fast/evaluation/guidance_report.py": ("evaluation/test_guidance_search.py",),
    "unite_fast/evaluation/provenance.py": ("evaluation/test_evaluate.py", "evaluation/test_guidance_search.py"),
    "unite_fast/evaluation/reference.py": ("evaluation/test_evaluate.py", "evaluation/test_evaluator.py"),
    "unite_fast/evaluation/report.py": ("evaluation/test_commands.py", "evaluation/test_evaluate.py"),
    "unite_fast/evaluation/settings.py": ("evaluation/test_evaluate.py", "evaluation/test_commands.py"),
    "unite_fast/evaluation/trajectory.py": ("evaluation/test_gallery.py",),
    "unite_fast/interop/names.py": ("interop/test_official.py",),
    "unite_fast/planning/assumptions.py": ("planning/test_predict.py", "planning/test_communication.py"),
    "unite_fast/planning/report.py": ("planning/test_predict.py", "planning/test_scaling.py"),
    "unite_fast/recipes.py": ("test_config.py",),
}


def twin(source: Path) -> Path:
    """unite_fast/optim/muon.py -> tests/optim/test_muon.py; a Triton file has the twin of its op."""
    folder = Path(*[part for part in source.parent.parts if part not in ("unite_fast", "triton_kernels")])
    return folder / f"test_{source.name}"


def covered(path: Path) -> bool:
    """tests/kernels/test_fused_op.py walks the registry of ops."""
    registered = path.parts[0] == "kernels" and path.stem in OPS
    return registered or (ROOT / "tests" / twin(path)).exists()


def sources() -> list[Path]:
    files = (path for top in ("unite_fast", "kernels", "data_pipeline") for path in (ROOT / top).rglob("*.py"))
    return sorted(path.relative_to(ROOT) for path in files if path.name not in ("__init__.py", "__main__.py"))


def test_every_source_file_is_covered():
    without = [str(path) for path in sources() if not covered(path)]
    assert len(sources()) > 100
    assert sorted(set(without) - COVERED_BY.keys()) == [], "write a test of that name, or add a line to COVERED_BY"
    assert sorted(COVERED_BY.keys() - set(without)) == [], "these have a twin, or are gone"


def test_the_named_tests_exist():
    assert [test for tests in COVERED_BY.values() for test in tests if not (ROOT / "tests" / test).exists()] == []
