"""From noise to images.

- `guidance.guided_velocity` applies the guidance interval, which `settings.SamplerConfig.guides_at` decides.
- To add a solver, write a function in `solvers`, add its name to `settings.Solver`, and call it in
  `sampler._follow`.
- `pipeline.SamplingModels.load` opens the tokenizer and the generator of a command.
"""
