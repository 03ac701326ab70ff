"""MODEL as users write it (Hub id, checkpoint folder, .gguf file, ``demo``) -> configuration, model, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_accelerate_available

from nirvana.architectures import FAMILIES, Architecture, describe
from nirvana.checkpoint.tensors import INDEX, SINGLE, CheckpointTensors
from nirvana.checkpoint.verify import check_config_file, verify
from nirvana.demo import NAME as DEMO
from nirvana.demo import demo_checkpoint, require_gguf_packages
from nirvana.errors import NirvanaError
from nirvana.parameters import auto_class, count_parameters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: what the user wrote.
        path: folder or Hub id for transformers.
        gguf: file name inside `path`, for a GGUF model.
        trust_remote_code: let transformers run code from the checkpoint; off unless the user turns it on.
    """

    name: str
    path: str
    gguf: str | None = None
    trust_remote_code: bool = False

    @property
    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.gguf:
            options["gguf_file"] = self.gguf
        return options

    def config(self) -> PreTrainedConfig:
        """The configuration; the family is checked before any weight is read."""
        return self._config

    @cached_property
    def _config(self) -> PreTrainedConfig:
        if not self.gguf and Path(self.path).is_dir():
            check_config_file(Path(self.path))
        # Read once: for a GGUF file it takes transformers 5 s, for a Hub model a question over the network.
        try:
            config = AutoConfig.from_pretrained(self.path, **self._options)
            blocks = describe(config).blocks
        except NirvanaError:
            raise
        except Exception as error:  # transformers raises almost anything for a configuration that makes no sense
            raise NirvanaError(
                f"cannot open model {self.name!r}: {_first_line(error)} (families: {', '.join(sorted(FAMILIES))})"
            ) from None
        for block in blocks:
            if block.size < 1 or block.channels < 1:
                raise NirvanaError(f"cannot open model {self.name!r}: {block.name} has {block.size} units")
        if not blocks:
            raise NirvanaError(f"cannot open model {self.name!r}: its configuration has no layers")
        # The plan names its base as the user did, not by the folder that "demo" or a cache stands for.
        config._name_or_path = self.name
        return config

    def architecture(self) -> Architecture:
        """The prunable blocks and the parameter count, from the configuration and the names in the weight files."""
        config = self.config()
        folder = Path(self.path)
        if self.gguf or not folder.is_dir() or not any((folder / file).is_file() for file in (SINGLE, INDEX)):
            return describe(config)
        usual = getattr(config, "scale_decoder_outputs", True)  # only T5 v1.1 leaves the question open
        own_head = None if usual else "lm_head.weight" in CheckpointTensors(folder).info()
        return replace(describe(config), parameters=count_parameters(config, own_head))

    def model(self, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
        """The model in evaluation mode.

        Args:
            dtype: "auto" (as stored; GGUF becomes float32), "float32", "bfloat16" or "float16".
            device: "auto" (CUDA where there is one), or a torch device.

        Raises:
            NirvanaError: not found, unknown family, damaged weights, unknown dtype or device.
        """
        place = resolve_device(device)
        options = self._options
        if self.gguf:
            options["quantization_config"] = GgufConfig(dequantize=True)
        else:
            options["use_safetensors"] = True
        options["dtype"] = resolve_dtype(dtype) or ("auto" if not self.gguf else torch.float32)
        if place.type != "cpu" and not self.gguf and is_accelerate_available():
            # Each tensor goes from its file to the device. Without accelerate transformers refuses: by way of the CPU.
            options["device_map"] = {"": place}
        config = self.config()
        if not self.gguf and Path(self.path).is_dir():
            # Reads the headers only, and unlike transformers names the file that is damaged and the tensor that is not
            # what the configuration says. transformers would draw missing weights at random and go on.
            verify(self.path, config)
        try:
            model, loading = auto_class(config).from_pretrained(self.path, output_loading_info=True, **options)
        except Exception as error:  # of Rust code, of missing quantisation packages, of anything in the configuration
            raise NirvanaError(f"cannot load the weights of {self.name!r}: {_first_line(error)}") from None
        if loading["missing_keys"]:
            raise NirvanaError(
                f"{self.name!r} holds no tensor {min(loading['missing_keys'])}; get the whole checkpoint"
            )
        model.config._name_or_path = self.name
        return model.to(place).eval()

    def refuse_as_target(self, out: str | Path) -> None:
        """Raise NirvanaError if writing to `out` would replace this model."""
        if Path(self.path).is_dir() and Path(out).exists() and Path(self.path).resolve() == Path(out).resolve():
            raise NirvanaError(f"{out} is the model that is to be pruned and is not overwritten; choose another name")

    def folder(self) -> Path:
        """The folder that holds the weights; a Hub model is downloaded into the Hub's own cache."""
        if Path(self.path).is_dir():
            return Path(self.path)
        try:
            return Path(snapshot_download(self.path, allow_patterns=["*.safetensors", "*.json"]))
        except (OSError, ValueError) as error:
            raise NirvanaError(f"cannot download {self.name!r}: {_first_line(error)}") from None

    def generation_config(self) -> GenerationConfig | None:
        """The defaults for generation that come with the checkpoint, if any."""
        if self.gguf:
            return None
        if Path(self.path).is_dir() and not (Path(self.path) / "generation_config.json").exists():
            return None
        try:
            return GenerationConfig.from_pretrained(self.path)
        except OSError as error:
            if not Path(self.path).is_dir():
                return None  # a Hub model without one
            raise NirvanaError(
                f"cannot read the generation_config.json of {self.name!r}: {_first_line(error)}"
            ) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise NirvanaError(f"the generation_config.json of {self.name!r} is wrong: {_first_line(error)}") from None

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, or None where the checkpoint has none (pre-tokenised calibration still works)."""
        folder = Path(self.path)
        if folder.is_dir() and not self.gguf and not any((folder / file).is_file() for file in TOKENIZER_FILES):
            return None
        try:
            return AutoTokenizer.from_pretrained(self.path, **self._options)
        except Exception as error:  # the Rust code of tokenizers raises bare exceptions
            raise NirvanaError(f"cannot load the tokenizer of {self.name!r}: {_first_line(error)}") from None


#: One of these makes a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "tokenizer_config.json")


def resolve(name: str | Path, trust_remote_code: bool = False) -> ModelSource:
    """Find out what MODEL means, without reading weights.

    Raises:
        NirvanaError: a file or folder that is no model.
    """
    path = Path(name)
    if str(name) == DEMO:
        return ModelSource(DEMO, str(demo_checkpoint()))
    if path.suffix == ".gguf":
        require_gguf_packages()
        if not path.is_file():
            raise NirvanaError(f"no file {path}")
        return ModelSource(str(name), str(path.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise NirvanaError(f"folder {path} has no config.json, so it is no checkpoint")
    elif path.exists():
        raise NirvanaError(f"{path} is neither a checkpoint folder nor a .gguf file")
    elif path.is_absolute() or str(name).count("/") > 1 or str(name).startswith("."):
        raise NirvanaError(f"no folder {path}; give a checkpoint folder, a .gguf file, a Hub id or 'demo'")
    else:
        _check_hub(str(name))
    return ModelSource(str(name), str(name), trust_remote_code=trust_remote_code)


def _check_hub(name: str) -> None:
    """Ask the Hub once, with a short patience: transformers alone would retry for half a minute on a misspelt name.

    Raises:
        NirvanaError: no such model there, or no way to ask; a model in the Hub's local cache is not asked for.
    """
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        HfApi().model_info(name, timeout=10)
    except HFValidationError:
        raise NirvanaError(f"{name!r} is neither a folder nor a .gguf file nor a Hub id (owner/name)") from None
    except RepositoryNotFoundError:
        raise NirvanaError(f"no folder {name!r} here and no such model on the Hub (or it is private: log in)") from None
    except Exception as error:  # of httpx or httpx2, which depends on the release of huggingface_hub
        raise NirvanaError(
            f"no folder {name!r} here, and the Hub cannot be asked ({_first_line(error)}); "
            "give a checkpoint folder, a .gguf file or 'demo'"
        ) from None


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise NirvanaError(
            f"--device {device!r} cannot be used (try auto, cpu or cuda): {_first_line(error)}"
        ) from None
    if place.type == "meta":
        raise NirvanaError("--device 'meta' holds no numbers; use auto, cpu or cuda")
    return place


def resolve_dtype(dtype: str, option: str = "--dtype") -> torch.dtype | None:
    """None stands for "auto": the type that is stored."""
    if dtype != "auto" and dtype not in DTYPES:
        raise NirvanaError(f"{option} {dtype!r} must be one of auto, {', '.join(DTYPES)}")
    return DTYPES.get(dtype)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
