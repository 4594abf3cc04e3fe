"""Sampling and reconstruction with a trained model. Which function to call:

- `pipeline.TrainedUNITE.generate`: images in memory from a loaded model, in one process. Start here.
- `sample_writer.write_samples`: many images to an .npz or a folder of PNGs, on all ranks, resumable.
- `distributed_sampler.sample_distributed`: the batches of this rank as an iterator, for evaluation.
- `sampler.sample_images`, `sample_batch`, `sample_latents`: the layers below, for a bare `UNITE`: any number of labels,
  one batch by a prepared `Network`, latents from given noise.
"""
