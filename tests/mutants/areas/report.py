"""Mutants of the metrics, console and files of a run. See ../run.py."""

CHANGES = [
    (
        "unite_fast/training/console.py",
        ("tests/training/test_console.py", "tests/training/test_trainer.py"),
        [
            ("with self.state.ema.applied(), torch.compiler", "with torch.compiler"),
            ("l1 {row['l1']:.4f}", "l1 {row['flow']:.4f}"),
            ("(self.config.train.steps - self.state.step)", "self.config.train.steps"),
            ("(self.state.step - self.first_step)\n", "self.state.step\n"),
            ("if outcome.stopped_by:", "if not outcome.stopped_by:"),
            ("list(skipped.items())[:MAX_SKIPPED_SHOWN]", "list(skipped.items())"),
        ],
    ),
    (
        "unite_fast/training/pictures.py",
        ("tests/training/test_pictures.py", "tests/training/test_console.py", "tests/training/test_trainer.py"),
        [
            (
                "model, labels, config.sampling, config.seed, precision=config.train.network_precision",
                "model, labels, config.sampling, 0, precision=config.train.network_precision",
            ),
            ("sampler.reconstruct(model, self.real, config.seed)", "sampler.reconstruct(model, self.real)"),
            ("partial(grid, samples, PICTURE_COLUMNS)", "partial(grid, samples.flip(0), PICTURE_COLUMNS)"),
            (
                "partial(pairs, self.real, reconstructions, PICTURE_COLUMNS)",
                "partial(pairs, reconstructions, self.real, PICTURE_COLUMNS)",
            ),
            (
                "source, held_out = open_held_out(*data, config.model.num_classes)",
                'source, held_out = open_source(*data, "train", config.model.num_classes), True',
            ),
            ("kind = HELD_OUT if held_out else", "kind = HELD_OUT if True else"),
            ("    except ClassesDiffer:\n        raise\n", ""),
        ],
    ),
    (
        "unite_fast/training/metrics.py",
        ("tests/training/test_metrics.py", "tests/training/test_restated.py"),
        [
            (
                'IMAGES: ("total", "l1", "lpips", "flow", "grad_norm", "latent_square"),',
                'IMAGES: ("total", "flow", "lpips", "l1", "grad_norm", "latent_square"),',
            ),
            ("self.sums += torch.where(finite, values, 0.0)", "self.sums += values"),
            ("self.count += finite\n", "self.count += 1\n"),
            ("torch.where(bad, step, self.first_bad_step)", "torch.where(~finite, step, self.first_bad_step)"),
            ("self.sums.zero_()", "pass"),
            ("self.count.zero_()", "pass"),
            ("self.sums /= ranks.world", "pass"),
            ("distributed.ReduceOp.MIN", "distributed.ReduceOp.MAX"),
            (
                'row["images_per_s_per_gpu"] * self.image_flops / self.peak',
                'row["images_per_s"] * self.peak / self.image_flops',
            ),
            ("rate = steps * self.batch_size / seconds", "rate = self.batch_size / seconds"),
            ("mean + SPIKE_DEVIATIONS * deviation", "mean + deviation"),
            (
                "self.purge_step = step + 1\n        self.use(folder)",
                "self.purge_step = step + 10\n        self.use(folder)",
            ),
        ],
    ),
    (
        "unite_fast/training/metrics.py",
        ("tests/training/test_metrics.py", "tests/training/test_restated.py", "tests/training/test_parallelize.py"),
        [
            ('"images_per_s_per_gpu": rate / current_ranks().world', '"images_per_s_per_gpu": rate'),
        ],
    ),
    (
        "unite_fast/training/step_timer.py",
        ("tests/training/test_step_timer.py", "tests/training/test_trainer.py"),
        [
            (
                'return elapsed, {**parts, "other": max(0.0, elapsed - sum(parts.values()))}',
                'return elapsed, {**parts, "other": elapsed}',
            ),
        ],
    ),
]
