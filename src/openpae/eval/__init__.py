"""Metrics of reconstructions and samples, `pae evaluate`, and the search for guidance.

- `run` is `pae evaluate`, `guidance_search` is `pae search-guidance`, `settings` has their configs.
  `evaluate` makes the record of an evaluation.
- `extractors` gives features (`inception` is the one of FID), `features` those of many images.
- `frechet` and `scores` have the metrics of samples, `generation` all of them in one pass, `reconstruction`
  PSNR, SSIM and LPIPS.
- `image_stream` has the images to measure, `reference` the real ones.
- A metric returns an `estimate.Estimate`, or `estimate.Undefined` with a reason.
"""
