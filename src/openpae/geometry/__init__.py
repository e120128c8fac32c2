"""The geometry of latent spaces, and `pae profile`.

- To add a metric, write a function in `metrics`, call it in `measure.measure_tokenizer` and add its name to
  `measure.METRIC_NAMES`; a name that is missing there is not reported. A metric that decodes is called where
  `measure_tokenizer` has a decoder; its name also stands in `missing` there, for tokenizers without one.
- `proxies` holds the metrics of other papers that predict generation, `interpolation` that of decodes between
  latents. `clusters` groups tokens for SSC. `settings` has counts and seeds.
- `profile` is `pae profile`, `profile_page` its page.
- `interop.spaces` opens the latent spaces that can be measured.
"""
