"""Mutants of the training step and its state. See ../run.py."""

CHANGES = [
    (
        "unite_fast/training/train_step.py",
        ("tests/training/test_train_step.py", "tests/training/test_restated.py"),
        [
            ("weighted_flow = config.objective.flow_weight * flow", "weighted_flow = flow"),
            (
                "backward(weighted_flow / divisor, to_accumulate)",
                "backward(0.5 * weighted_flow / divisor, to_accumulate)",
            ),
            ("backward(weighted_flow / divisor, to_accumulate)", "backward(weighted_flow, to_accumulate)"),
            ("backward(reconstruction.loss / divisor, to_accumulate)", "backward(reconstruction.loss, to_accumulate)"),
            (
                "backward(reconstruction.loss / divisor, to_accumulate)",
                "backward(reconstruction.loss / 2 / divisor, to_accumulate)",
            ),
            ("config, lpips, batch.lpips_dropout)", "config, lpips, None)"),
            (
                "total = reconstruction.loss.detach() + weighted_flow.detach()",
                "total = reconstruction.loss.detach() + flow.detach()",
            ),
            (
                "terms = [reconstruction.l1, flow.detach(), reconstruction.lpips,",
                "terms = [flow.detach(), reconstruction.l1, reconstruction.lpips,",
            ),
            (
                "terms = [reconstruction.l1, flow.detach(), reconstruction.lpips,",
                "terms = [reconstruction.l1, weighted_flow.detach(), reconstruction.lpips,",
            ),
            ("reconstruction.latent_square]) / divisor", "reconstruction.latent_square])"),
            ("sums = losses if sums is None else sums + losses", "sums = losses"),
            (
                "flow_losses(model, reconstruction.z, batch.labels, batch.draws,",
                "flow_losses(model, reconstruction.z, batch.labels.flip(0), batch.draws,",
            ),
            ('enabled=precision == "bfloat16"', "enabled=False"),
            ('enabled=precision == "bfloat16"', "enabled=True"),
            ("if config.data.flip:", "if not config.data.flip:"),
            ("philox.uniform(Stream.FLIP) < 0.5", "philox.uniform(Stream.FLIP) < 0.6"),
            ("images.flip(-1), images)", "images.flip(-2), images)"),
            (".float() / 255", ".float() / 256"),
            ("philox if config.perceptual.dropout else None", "philox"),
            ("philox if config.perceptual.dropout else None", "None"),
            (
                "torch.arange(self.batch_slice.start, self.batch_slice.stop,",
                "torch.arange(0, self.batch_slice.stop - self.batch_slice.start,",
            ),
            ("Philox(self.config.seed, 0, positions)", "Philox(0, 0, positions)"),
            ("at_step(positions, self.state.step)", "positions"),
            ("at_step(positions, self.state.step)", "at_step(positions, self.state.step + 1)"),
            ("if config.perceptual.weight and lpips is None:", "if False:"),
        ],
    ),
    (
        "unite_fast/training/cuda_graph.py",
        ("tests/training/test_cuda_graph.py",),
        [
            ("place.copy_(value, non_blocking=True)", "pass"),
            ("parameter.grad = gradient", "pass"),
            ("if self.steps == SETTLED:", "if False:"),
            ("Losses(*(loss.clone() for loss in values(self.losses)))", "self.losses"),
            ("if worst > TOLERANCE:", "if worst > 100:"),
            ("(one is None) != (other is None)", "False"),
            ("if any(parameter.grad is not None for parameter in self.parameters):", "if False:"),
            (
                "with self.clock.paused():\n            self.losses =",
                "if True:\n            self.losses =",
            ),
        ],
    ),
    (
        "unite_fast/training/train_step.py",
        ("tests/training/test_restated.py",),
        [
            (
                "reduce_gradients(model, strategy, decoder=last, others=last)",
                "reduce_gradients(model, strategy, decoder=last, others=False)",
            ),
            ("None if isinstance(model, FSDPModule) else list(model.parameters())", "list(model.parameters())"),
        ],
    ),
    (
        "unite_fast/training/train_step.py",
        ("tests/training/test_parallelize.py",),
        [
            (
                "reduce_gradients(model, strategy, decoder=last, others=False)",
                "reduce_gradients(model, strategy, decoder=False, others=False)",
            ),
        ],
    ),
    (
        "unite_fast/objective.py",
        ("tests/training/test_train_step.py", "tests/training/test_restated.py"),
        [
            ("loss = l1 + config.perceptual.weight * perceptual", "loss = l1 + perceptual"),
            ("loss = l1 + config.perceptual.weight * perceptual", "loss = l1"),
            ("    z = z.detach()\n    return Reconstruction(", "    return Reconstruction("),
            ("lpips(images, recon, lpips_dropout)", "lpips(recon, images, lpips_dropout)"),
            ("draws.decoder_noise_time[None], draws.decoder_noise_mask)", "draws.decoder_noise_time[None])"),
            ("torch.where(draws.label_drop, model.config.num_classes, labels)", "labels.expand_as(draws.label_drop)"),
            (".mean() * len(draws.flow_time)", ".mean()"),
            ("time_min + (1 - time_min) * philox", "time_min * philox"),
        ],
    ),
    (
        "unite_fast/training/train_state.py",
        ("tests/training/test_train_state.py", "tests/training/test_restated.py"),
        [
            ("            self.ema.update(skipped)\n", ""),
            (
                "norm = self.gradient_norm()\n        skipped",
                "norm = self.gradient_norm()\n        self.ema.update()\n        skipped",
            ),
            ("EMA(model, config.optim.ema_decay)", "EMA(model, 0.9978)"),
            ("self.config.optim.clip_norm / (norm + 1e-6)", "3.0 / (norm + 1e-6)"),
            ("torch._foreach_mul_(gradients, (self", "torch._foreach_mul(gradients, (self"),
            (".clamp(max=1.0))", ")"),
            ('group["lr"] = self.learning_rate', 'group["lr"] = self.last_learning_rate'),
            ("self.config.train.batch_size, self.step - 1)", "self.config.train.batch_size, self.step)"),
            ("parameter.grad = None", "pass"),
            ("self.step += 1", "self.step += 2"),
            ("self.skipped_steps += count", "pass"),
            ("(~norm.isfinite()).float()", "norm.isfinite().float()"),
            ("optim.muon_momentum, optim.eps, getattr", "0.95, optim.eps, getattr"),
            ("optim.adamw_betas, optim.eps)", "(0.9, 0.999), optim.eps)"),
            ("optim.adamw_betas, optim.eps)", "optim.adamw_betas, 1e-6)"),
        ],
    ),
    (
        "unite_fast/training/train_state.py",
        ("tests/training/test_restated.py", "tests/training/test_parallelize.py"),
        [
            ("torch.distributed.all_reduce(square, group=group)", "pass"),
        ],
    ),
    (
        "unite_fast/optim/ema.py",
        ("tests/training/test_train_state.py", "tests/training/test_restated.py"),
        [
            (
                "torch._foreach_lerp_(averages, parameters, 1 - self.decay)",
                "torch._foreach_lerp_(averages, parameters, self.decay)",
            ),
        ],
    ),
    (
        "unite_fast/optim/ema.py",
        ("tests/optim/test_ema.py",),
        [
            ("torch._foreach_lerp_(averages, parameters, 1 - self.decay)", "pass"),
            ("self._assign(parameters, self._local(self.averages))", "pass"),
        ],
    ),
    (
        "unite_fast/optim/muon.py",
        ("tests/optim/test_muon.py",),
        [
            ("COEFFICIENTS = (3.4445, -4.7750, 2.0315)", "COEFFICIENTS = (3.4445, -4.7750, 2.0325)"),
            ("lr * 0.2 * max(shape) ** 0.5", "lr * 0.2 * max(shape)"),
        ],
    ),
    (
        "unite_fast/optim/fused_step.py",
        ("tests/optim/test_fused_step.py",),
        [
            ("rate_of(p.shape, lr)", "lr"),
            ("self.ema.update(found_inf, except_for=moved)", "self.ema.update(found_inf)"),
            ("self.ema.update(found_inf, except_for=moved)", "pass"),
            ("(self.clip_norm / (norm + 1e-6)).clamp(max=1.0)", "1.0"),
        ],
    ),
    (
        "kernels/triton_kernels/optimizer.py",
        ("tests/optim/test_fused_step.py",),
        [
            ("tl.where(b_before, b_end, 0)", "tl.where(b_before, b_end - 1, 0)"),
            ("tl.minimum(clip_norm / (tl.load(norm) + 1e-6), 1.0)", "1.0"),
            ("other=0.0) + 1.0", "other=0.0)"),
            ("tl.sqrt(1.0 - tl.exp(b_step.to(tl.float64) * LOG_BETA_2))", "1.0"),
            ("not (addresses % 16).any() and not (counts % 8).any()", "True"),
        ],
    ),
    (
        "unite_fast/optim/lr_schedule.py",
        ("tests/optim/test_lr_schedule.py",),
        [
            ("progress = (step - first) / (last - first)", "progress = (step + 1 - first) / (last - first)"),
        ],
    ),
    (
        "unite_fast/optim/param_groups.py",
        ("tests/optim/test_param_groups.py",),
        [
            ('"in_context_posemb", "latent_tokens", ', '"in_context_posemb", '),
            ('"atom_embed", "atom_table")', '"atom_embed")'),
            ('"atom_embed", "atom_table")', '"atom_table")'),
        ],
    ),
    (
        "unite_fast/training/gradients.py",
        ("tests/training/test_gradients.py",),
        [
            ("torch._foreach_add_([old for old, _ in pairs], [new for _, new in pairs])", "pass"),
        ],
    ),
    (
        "unite_fast/training/gradients.py",
        ("tests/training/test_gradients.py", "tests/training/test_train_step.py", "tests/training/test_restated.py"),
        [
            ("parameter.grad = old\n", "pass\n"),
        ],
    ),
    (
        "unite_fast/training/train_step.py",
        ("tests/training/test_train_step.py", "tests/benchmarks/test_launches.py"),
        [
            ("cast_once(weights_to_cast(model, lpips, precision))", "nullcontext()"),
        ],
    ),
    (
        "unite_fast/training/train_step.py",
        ("tests/benchmarks/test_launches.py",),
        [
            (
                "with nullcontext() if to_accumulate is None else foreach_accumulation(to_accumulate):",
                "with nullcontext():",
            ),
        ],
    ),
]
