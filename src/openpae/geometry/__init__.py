"""The geometry of latent spaces, and `pae profile`.

- To add a metric, write a function in `metrics`, call it in `measure.measure_tokenizer` and add its name to
  `measure.METRIC_NAMES`.
- `spaces` opens the latent spaces that can be measured.
"""
