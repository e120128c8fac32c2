"""From noise to images.

- `guidance.guided_velocity` applies the guidance interval. `settings.SamplerConfig.guides_at` says whether
  a position lies in it.
- To add a solver, write a function in `solvers`, add its name to `settings.Solver`, call it in
  `sampler._follow`, and count its evaluations in `sampler.evaluations`.
- `pipeline.SamplingModels.load` opens the tokenizer and the generator of a command. `pipeline.Pipeline` is
  both for Python, with the names of `arguments`.
- `sample_set` writes samples to disk. `interpolation` is `pae interpolate`.
"""
