"""A fast trainer for UNITE: one network that is tokenizer and latent denoiser, trained in one stage."""
