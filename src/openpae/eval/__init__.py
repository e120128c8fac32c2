"""Metrics of reconstructions and samples, `pae evaluate`, and the search for guidance.

- `extractors` gives features, `frechet` and `scores` the metrics, `generation` all of them in one pass.
- A metric returns an `estimate.Estimate`, or `estimate.Undefined` with a reason.
"""
