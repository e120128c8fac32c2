"""A tokenizer and its generator as a `DiffusionPipeline` of the diffusers package (extra `diffusers`).

Import this module before you load a saved pipeline: diffusers does not import it by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from openpae import config as configs
from openpae.interop.diffusers_adapter import AutoencoderPAE
from openpae.models.ditdh import GENERATORS, build_generator
from openpae.models.generator import LatentGenerator
from openpae.models.tokenizer import Autoencoder
from openpae.runtime.extras import needs

with needs("diffusers", "PAEPipeline"):
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
    from diffusers.utils.torch_utils import randn_tensor

PAPER_SHIFT = 0.4
"""Shift of the paper's grid of positions t from noise to data; see `SamplerConfig.shift`."""


class GeneratorPAE(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers has no types
    """A generator as diffusers calls one: noise at sigma 1, data at 0, a timestep of 1000 sigma.

    The path is x = (1 - sigma) data + sigma noise, so t = 1 - sigma, and its derivative by sigma is the
    negative of openpae's velocity. Latents are normalised; `denormalise` brings them to the tokenizer's
    scale.

    Args:
        generator: config of the generator, as plain data with its `kind`.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, generator: dict[str, Any]) -> None:
        super().__init__()
        kinds, fields = {kind.__name__: kind for kind in GENERATORS}, dict(generator)
        self.dit: LatentGenerator = build_generator(configs.from_dict(kinds[fields.pop("kind")], fields))

    @classmethod
    def of(cls, generator: LatentGenerator) -> Self:
        """A generator of openpae for diffusers; the weights are shared."""
        with torch.device("meta"):  # its weights are replaced below
            config = generator.config
            model: Self = cls(generator={"kind": type(config).__name__, **configs.to_dict(config)})
        model.dit = generator
        return model.train(generator.training)  # type: ignore[no-any-return]

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The derivative of the path by sigma.

        Args:
            hidden_states: normalised latents at sigma, (B, C, h, w).
            timestep: 1000 sigma, (B,).
            class_labels: classes in [0, K], (B,); K is the null class.
            return_dict: give an object with `.sample`, not a tuple.
        """
        velocity = self.dit(hidden_states, 1 - timestep.float() / 1000, class_labels)
        sample = -velocity.to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def denormalise(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) to the tokenizer's scale, in float32."""
        return self.dit.denormalise(latents)


class PAEPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers has no types
    """Classes to images. `of` makes one from models of openpae; `save_pretrained`, `from_pretrained`, `to`,
    `enable_model_cpu_offload` and the progress bar are diffusers' own.

    Args:
        vae: decodes.
        transformer: the generator.
        scheduler: a scheduler of flow matching. Its shift is 1 / openpae's shift.
        id2label: names of the classes by number, for `get_label_ids`.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        vae: AutoencoderPAE,
        transformer: GeneratorPAE,
        scheduler: FlowMatchEulerDiscreteScheduler,
        id2label: Mapping[Any, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.register_to_config(id2label=None if id2label is None else dict(id2label))
        self.labels = {name: int(number) for number, name in (id2label or {}).items()}
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=scale)

    @classmethod
    def of(
        cls, tokenizer: Autoencoder, generator: LatentGenerator, *, names: Sequence[str] | None = None
    ) -> Self:
        """A tokenizer and a generator of openpae as a pipeline of diffusers; the weights are shared.

        Args:
            tokenizer: with its encoder, or without it for sampling only.
            generator: of its latents.
            names: names of the classes 0, 1, ...; None for those of the generator, if it has them.

        Raises:
            ValueError: see `AutoencoderPAE.of`; or the generator makes other latents than the tokenizer's.
        """
        wanted, given = tokenizer.config.latent_shape, generator.config.latent_shape
        if wanted != given:
            raise ValueError(f"the tokenizer decodes latents of {wanted}, the generator makes {given}")
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / PAPER_SHIFT)
        names = generator.class_names if names is None else names
        labels = None if names is None else {str(number): name for number, name in enumerate(names)}
        return cls(AutoencoderPAE.of(tokenizer), GeneratorPAE.of(generator), scheduler, labels)

    def get_label_ids(self, names: str | Sequence[str]) -> list[int]:
        """The numbers of classes with these names. Raises ValueError for a name that is not known."""
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            if name not in self.labels:
                raise ValueError(f"unknown class {name!r}; known: {', '.join(self.labels) or 'no names'}")
        return [self.labels[name] for name in names]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        num_inference_steps: int = 249,
        guidance_scale: float = 2.5,
        guidance_start: float = 0.25,
        guidance_end: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Mapping[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample one image of each of these classes. The defaults are the paper's guided setting.

        Args:
            class_labels: classes by number, in [0, K), where K is the null class, or by name.
            num_inference_steps: steps of the scheduler.
            guidance_scale: w of v_null + w (v - v_null); 1 is no guidance.
            guidance_start: guide where t >= this, t from 0 (noise) to 1 (data).
            guidance_end: guide where t <= this.
            generator: of the noise; with a list each image has its own.
            latents: the noise, (B, C, h, w), in place of `generator`.
            output_type: pil, np, pt, or latent for latents in the tokenizer's scale.
            return_dict: give an object with `.images`, not a tuple.
            callback_on_step_end: called with the pipeline, the number of the step, its timestep and a dict;
                values that it returns replace those of the loop. To stop early, it sets
                `pipeline._interrupt = True`.
            callback_on_step_end_tensor_inputs: names in that dict; latents is known.

        Raises:
            ValueError: a class out of range, latents of another shape, or an unknown name of a tensor.
        """
        labels = self._checked(class_labels, callback_on_step_end_tensor_inputs)
        x, self._interrupt = self._noise(latents, generator, len(labels)), False
        classes = torch.tensor(labels, device=x.device)
        null = torch.full_like(classes, self.transformer.dit.null_label)
        sigmas = (1 - np.arange(num_inference_steps) / num_inference_steps).tolist()
        self.scheduler.set_timesteps(sigmas=sigmas, device=x.device)
        with self.progress_bar(total=num_inference_steps) as bar:
            for number, timestep in enumerate(self.scheduler.timesteps):
                if self._interrupt:
                    continue
                at, t = timestep.expand(len(labels)), np.float32(1 - float(timestep) / 1000)
                velocity = self.transformer(x, at, classes, return_dict=False)[0]
                if guidance_scale != 1 and np.float32(guidance_start) <= t <= np.float32(guidance_end):
                    weak = self.transformer(x, at, null, return_dict=False)[0]
                    velocity = weak + guidance_scale * (velocity - weak)
                x = self.scheduler.step(velocity, timestep, x, return_dict=False)[0]
                if callback_on_step_end is not None:
                    kept = {"latents": x} if callback_on_step_end_tensor_inputs else {}
                    x = (callback_on_step_end(self, number, timestep, kept) or {}).get("latents", x)
                bar.update()
        images = self._images(self.transformer.denormalise(x), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(
        self, given: Tensor | None, generator: torch.Generator | list[torch.Generator] | None, count: int
    ) -> Tensor:
        shape, device = (count, *self.transformer.dit.config.latent_shape), self._execution_device
        if given is None:
            drawn: Tensor = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
            return drawn
        if tuple(given.shape) != shape:
            raise ValueError(f"latents must be {shape}, got {tuple(given.shape)}")
        return given.to(device, torch.float32)

    def _images(self, z: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return z
        decoded = self.vae.decode(z, return_dict=False)[0].float()
        return self.image_processor.postprocess(decoded, output_type=output_type)

    def _checked(self, class_labels: int | str | Sequence[int | str], tensors: Sequence[str]) -> list[int]:
        given = [class_labels] if isinstance(class_labels, int | str) else list(class_labels)
        labels = [self.get_label_ids(one)[0] if isinstance(one, str) else int(one) for one in given]
        highest = self.transformer.dit.null_label
        if not labels or min(labels) < 0 or max(labels) > highest:
            raise ValueError(f"class_labels must name classes in [0, {highest}], got {labels}")
        if unknown := set(tensors) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs knows {', '.join(self._callback_tensor_inputs)}, got "
                f"{', '.join(sorted(unknown))}"
            )
        return labels
