"""Classes to images in one call: a generator and the tokenizer of its latents."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, overload

import torch
from PIL import Image
from torch import Tensor

from openpae.data.classes import labels_of
from openpae.interop.any_tokenizer import AnyTokenizer, decoded_shape, open_pair
from openpae.interop.kinds import KINDS
from openpae.models.generator import LatentGenerator
from openpae.models.saved import check_origin, generator_identity, load_generator
from openpae.models.tokenizer import Autoencoder
from openpae.sampling.arguments import OUTPUT_TYPES, Images, OutputType, in_output_type, same_value, seed_of
from openpae.sampling.sampler import sample_batches, sample_images
from openpae.sampling.settings import SamplerConfig
from openpae.storage import hub
from openpae.storage.card import model_card
from openpae.storage.model_folder import PARTS, README, identity_of, new_model_folder


@dataclass(frozen=True)
class SamplingModels:
    """Tokenizer and generators on one device, checked against each other."""

    tokenizer: Autoencoder | AnyTokenizer
    """Decodes. One of openpae is loaded without its encoder."""
    generator: LatentGenerator
    """Makes the latents."""
    weak: LatentGenerator | None
    """Guides in place of the null class (AutoGuidance); None for classifier-free guidance."""
    device: torch.device
    """The device of all models."""
    facts: dict[str, Any]
    """For records: fingerprints, precision, compile."""

    @classmethod
    def load(
        cls,
        tokenizer: str | Path,
        generator: str | Path,
        weak: str | Path | None = None,
        *,
        device: torch.device,
        precision: str = "fp32",
        compile: bool = False,
    ) -> SamplingModels:
        """Load a tokenizer and a generator of its latents.

        Args:
            tokenizer: a tokenizer folder, a run folder, or KIND:SOURCE; see `interop.kinds`.
            generator: a generator folder or a run folder.
            weak: folder of a smaller or less trained generator of the same latents.
            device: device of the models.
            precision: fp32 or bf16. It is only recorded; the caller opens autocast.
            compile: compile the generators.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: the models do not belong together, or weights are damaged or do not fit.
        """
        decoder, facts = open_pair(tokenizer, generator, device)
        if weak is not None:
            other = generator_identity(weak)
            own = generator_identity(generator).made_with
            check_origin(tokenizer, f"{weak} makes latents", other.made_with, own)
            facts["autoguidance"] = other.fingerprint
        generators = [load_generator(folder).to(device) for folder in (generator, weak) if folder is not None]
        for model in generators if compile else []:
            model.compile()
        return cls(
            tokenizer=decoder,
            generator=generators[0],
            weak=generators[1] if len(generators) > 1 else None,
            device=device,
            facts={**facts, "precision": precision, "compile": compile},
        )

    @property
    def image_shape(self) -> tuple[int, int]:
        """(H, W) of the images. Raises ValueError if the tokenizer has no decoder."""
        return decoded_shape(self.tokenizer, self.generator.config.latent_shape)


class Pipeline:
    """A generator and the tokenizer that decodes its latents.

    Args:
        tokenizer: decodes. The generator must have been trained on its latents; `from_pretrained` and `join`
            check that.
        generator: makes the latents.
    """

    def __init__(self, tokenizer: Autoencoder | AnyTokenizer, generator: LatentGenerator) -> None:
        self.tokenizer, self.generator = tokenizer, generator

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        revision: str | None = None,
        decode_only: bool = True,
        torch_dtype: torch.dtype | None = None,
    ) -> Self:
        """Load a saved pair, in evaluation mode.

        Args:
            name_or_folder: a folder with the subfolders tokenizer and generator (model or run folders, as
                `pae quickstart` writes them), a name of `list_models()` such as openmoji, or a name
                OWNER/NAME of the hub.
            revision: branch, tag or commit of the hub.
            decode_only: leave out the frozen encoder, which sampling does not need.
            torch_dtype: torch.bfloat16 or torch.float16 for half precision; None is float32.

        Raises:
            FileNotFoundError: no such folder or name, or a subfolder is missing.
            ValueError: the two do not belong together, or weights are damaged or do not fit.
        """
        folder = hub.find_model(name_or_folder, revision)
        if missing := [part for part in PARTS if not (folder / part).is_dir()]:
            raise FileNotFoundError(
                f"{folder} holds no pair: it lacks {' and '.join(missing)}; Pipeline.join takes two folders"
            )
        folders = (folder / part for part in PARTS)
        return cls.join(*folders, decode_only=decode_only, torch_dtype=torch_dtype)

    @classmethod
    def join(
        cls,
        tokenizer: str | Path,
        generator: str | Path,
        *,
        decode_only: bool = True,
        torch_dtype: torch.dtype | None = None,
    ) -> Self:
        """Load a tokenizer and a generator from two places.

        Args:
            tokenizer: a model or run folder, a name of the hub, or KIND:SOURCE for one of another kind; see
                `interop.kinds`.
            generator: a model or run folder, or a name of the hub.
            decode_only: see `from_pretrained`.
            torch_dtype: see `from_pretrained`.

        Raises:
            FileNotFoundError, ValueError: see `from_pretrained`.
        """
        if not str(tokenizer).startswith(tuple(f"{kind}:" for kind in KINDS)):
            tokenizer = hub.find_model(tokenizer)
        folder = hub.find_model(generator)
        decoder, _ = open_pair(tokenizer, folder, decode_only=decode_only, torch_dtype=torch_dtype)
        return cls(decoder, load_generator(folder, torch_dtype=torch_dtype))

    def to(self, *args: Any, **settings: Any) -> Self:
        """Move both to a device, to half precision, or both: `to("cuda", torch.bfloat16)`.

        The arguments are those of `torch.nn.Module.to`. See `models.precision.MixedPrecision` for what half
        precision rounds.
        """
        self.tokenizer.to(*args, **settings)
        self.generator.to(*args, **settings)
        return self

    def bfloat16(self) -> Self:
        """Both in bfloat16; see `to`."""
        return self.to(torch.bfloat16)

    def half(self) -> Self:
        """Both in float16; see `to`."""
        return self.to(torch.float16)

    def float(self) -> Self:
        """Both in float32. Weights that were rounded stay rounded."""
        return self.to(torch.float32)

    @overload
    def __call__(
        self,
        class_labels: Sequence[int | str],
        *,
        steps: int | None = ...,
        seed: int | None = ...,
        sampler: SamplerConfig | None = ...,
        batch_size: int = ...,
        output: Literal["pil"] | None = ...,
        num_inference_steps: int | None = ...,
        guidance_scale: builtins.float | None = ...,
        generator: torch.Generator | None = ...,
        output_type: Literal["pil"] | None = ...,
    ) -> Images[Image.Image]: ...

    @overload
    def __call__(
        self,
        class_labels: Sequence[int | str],
        *,
        output: Literal["tensor"],
        steps: int | None = ...,
        seed: int | None = ...,
        sampler: SamplerConfig | None = ...,
        batch_size: int = ...,
        num_inference_steps: int | None = ...,
        guidance_scale: builtins.float | None = ...,
        generator: torch.Generator | None = ...,
        output_type: Literal["pt"] | None = ...,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        class_labels: Sequence[int | str],
        *,
        output_type: Literal["np", "pt", "latent"],
        steps: int | None = ...,
        seed: int | None = ...,
        sampler: SamplerConfig | None = ...,
        batch_size: int = ...,
        num_inference_steps: int | None = ...,
        guidance_scale: builtins.float | None = ...,
        generator: torch.Generator | None = ...,
        output: None = ...,
    ) -> Images[Any]: ...

    def __call__(
        self,
        class_labels: Sequence[int | str],
        *,
        steps: int | None = None,
        seed: int | None = None,
        sampler: SamplerConfig | None = None,
        batch_size: int = 32,
        output: Literal["pil", "tensor"] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: builtins.float | None = None,
        generator: torch.Generator | None = None,
        output_type: OutputType | None = None,
    ) -> Images[Any] | Tensor:
        """Sample one image of each of these classes.

        Args:
            class_labels: a list of classes: numbers in [0, K), where K is the null class, or names, or both.
            steps: steps of the solver, in place of the sampler's.
            seed: image i depends on (seed, i) and its class alone; None is 0.
            sampler: solver and guidance; None is the paper's guided setting.
            batch_size: images per batch. It changes rounding only.
            output: "pil" for Pillow images (None too), "tensor" for (n, 3, H, W) in [0, 1] on the CPU.
            num_inference_steps: diffusers' name of `steps`.
            guidance_scale: guidance, in place of the sampler's.
            generator: stands for `seed`; see `arguments.seed_of`.
            output_type: diffusers' name of `output`; see `arguments.OutputType`.

        Returns:
            A list that also has `.images`; a tensor for output="tensor".

        Raises:
            TypeError: a class is neither an integer nor text.
            ValueError: no classes, a class that the generator does not know, another output, or two names of
                one argument with different values.
        """
        if output not in (None, "pil", "tensor"):
            raise ValueError(f"output must be 'pil' or 'tensor', got {output!r}")
        if output_type not in (None, *OUTPUT_TYPES):
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        named = {"tensor": "pt"}.get(output or "", output)
        kind: OutputType = same_value(output=named, output_type=output_type) or "pil"
        if isinstance(class_labels, str):
            raise ValueError(f"class_labels must be a list of classes, got {class_labels!r}; write it in []")
        if not len(class_labels):
            raise ValueError("class_labels must name at least one class")
        changes: dict[str, Any] = {
            "steps": same_value(steps=steps, num_inference_steps=num_inference_steps),
            "guidance": guidance_scale,
        }
        changes = {name: value for name, value in changes.items() if value is not None}
        config = replace(sampler or SamplerConfig(), **changes)
        drawn = None if generator is None else seed_of(generator)
        known = self.generator.class_names, self.generator.config.num_classes
        labels = torch.tensor(labels_of("the generator", class_labels, *known), dtype=torch.int64)
        samples = self._samples(
            labels, config, same_value(seed=seed, generator=drawn) or 0, batch_size, kind == "latent"
        )
        return samples if output == "tensor" else in_output_type(samples, kind)

    def _samples(
        self, labels: Tensor, config: SamplerConfig, seed: int, batch_size: int, latent: bool
    ) -> Tensor:
        """Images (n, 3, H, W) or latents (n, C, h, w), on the CPU."""
        if latent:
            batches = [
                range(row, min(row + batch_size, len(labels))) for row in range(0, len(labels), batch_size)
            ]
            drawn = sample_batches(self.generator, labels, config, batches, seed=seed)
            return torch.cat([z.cpu() for z in drawn])
        images = sample_images(
            self.tokenizer, self.generator, labels, config, seed=seed, batch_size=batch_size
        )
        return torch.cat(list(images))

    def save_pretrained(self, folder: str | Path, *, precision: hub.Precision = "fp32") -> None:
        """Write both to the subfolders tokenizer and generator, and a model card.

        Args:
            folder: the new folder. An old one is replaced if it holds nothing but a saved model or pair.
            precision: type of the saved parameters. It changes the fingerprint of the tokenizer, which the
                saved generator repeats.

        Raises:
            ValueError: the folder holds something else, or the tokenizer is not openpae's or was loaded
                without the encoder that belongs to its file.
        """
        if isinstance(self.tokenizer, AnyTokenizer):
            raise ValueError(
                f"{self.tokenizer.space.name} is no tokenizer of openpae, so the pair cannot be saved; save "
                "the generator (pipeline.generator.save_pretrained), which names its tokenizer"
            )
        with new_model_folder(Path(folder)) as partial:
            folders = {part: partial / part for part in PARTS}
            self.tokenizer.save_pretrained(folders["tokenizer"], precision=precision)
            made_with = identity_of(folders["tokenizer"]).fingerprint
            hub.save(
                self.generator,
                folders["generator"],
                made_with=made_with,
                precision=precision,
                classes=self.generator.classes,
                parent=self.generator.parent,
            )
            (partial / README).write_text(model_card(folders, str(folder), None), encoding="utf-8")

    def push_to_hub(self, repo: str, *, licence: str | None = None, private: bool = False) -> str:
        """Save and upload to the hub, and return the address; see `hub.push`."""
        return hub.push_saved(self.save_pretrained, repo, licence=licence, private=private)
