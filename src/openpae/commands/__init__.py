"""The commands of `pae`, one function each. Their signatures are the options, their docstrings the help.

- `cli` names the file of each command: `bench`, `demo`, `env`, `interpolate`, `plan`, `presets`,
  `reconstruct`, `sample`, `search`, `study`; `data`, `train`, `measure` and `publish` hold several.
  `describe` makes the lines of `pae info`.
- `console` holds the options that several commands share, `sampler` those of sampling. `fields` makes the
  help of configs, `completion` the script for shells.
- A model argument is a model folder or a run folder. `storage.model_folder.model_folder` finds the model:
  the folder itself, or the newest checkpoint of a run.
- A pair is one argument: `pairs` replaces it by its tokenizer and generator. So `pae sample PAIR OUT` opens
  PAIR/tokenizer and PAIR/generator, and `pae sample TOKENIZER GENERATOR OUT` the two folders that it names.
  `models.saved.check_pair` checks that they belong together.
"""
