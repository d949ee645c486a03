"""Hugging Face models: load dense or packed directories, tokenize files."""

from __future__ import annotations

import lzma
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint

PIECE = 100_000  # characters fed to the tokenizer at once


def from_pretrained(
    directory: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The model of a dense or packed directory, in eval mode.

    It is of the class that config.json names under "architectures", a causal language model where
    it names none. `dtype` is that of tensors outside compressed layers. Raises FileNotFoundError or
    ValueError in one sentence, ImportError with the line to type when transformers is missing.
    """
    transformers = _transformers()
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: there is no such directory")
    config = checkpoint.read_config(directory)
    quantization = config.pop("quantization_config", None)
    if quantization is None:
        return _dense(_class(transformers, config, directory), directory, dtype).eval()
    opened = checkpoint.open_checkpoint(directory)
    if not config.get("model_type"):
        raise ValueError(
            f"{directory}: this is no transformers model (config.json has no model_type); build "
            "the model yourself and call reality_stone.load(model, directory)"
        )
    return checkpoint.load(_empty(transformers, config, dtype, opened), directory).eval()


def quantization_config_class() -> type:
    """RealityStoneConfig, which is a class of transformers. ImportError with the line to type."""
    _import_transformers()
    from .hf_quantizer import RealityStoneConfig

    return RealityStoneConfig


def is_packed(directory: str | os.PathLike[str]) -> bool:
    """Whether config.json says that layers are compressed by us."""
    quantization = checkpoint.read_config(Path(directory)).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == checkpoint.METHOD


def source_dtype(directory: str | os.PathLike[str]) -> torch.dtype:
    """The dtype a model directory says it is stored in; float32 where it does not say."""
    config = checkpoint.read_config(Path(directory))
    name = config.get("dtype") or config.get("torch_dtype")
    found = getattr(torch, name, None) if isinstance(name, str) else None
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.float32


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """The tokenizer of a model directory (transformers). Raises FileNotFoundError or ValueError."""
    transformers = _transformers()
    directory = Path(directory)
    if not any((directory / name).is_file() for name in checkpoint.TOKENIZER_FILES):
        raise FileNotFoundError(f"{directory}: there is no tokenizer in this directory")
    try:
        return transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:
        raise ValueError(
            f"{directory}: the tokenizer cannot be loaded: {first_line(error)}"
        ) from error


def read_text(path: str | os.PathLike[str]) -> str:
    """A UTF-8 text file, plain or .xz. Raises FileNotFoundError or ValueError."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: this is not readable text: {error}") from None
    # As files opened in text mode: one sign for the end of a line.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def tokenize_file(
    tokenizer: Any,
    path: str | os.PathLike[str],
    *,
    tokens: int | None = None,
    pieces: int | None = None,
) -> Tensor:
    """Token ids (n,) of a text file, fed to the tokenizer in pieces of 100,000 characters.

    `tokens` stops after that many. `pieces` takes at most that many pieces, spread evenly over the
    file: enough for calibration, and quick. Raises FileNotFoundError or ValueError.
    """
    text = read_text(path)
    starts = list(range(0, len(text), PIECE))
    if pieces is not None and len(starts) > pieces:
        starts = [starts[i * len(starts) // pieces] for i in range(pieces)]
    found: list[Tensor] = []
    count = 0
    for i in range(0, len(starts), 8):
        found.append(tokenize(tokenizer, [text[s : s + PIECE] for s in starts[i : i + 8]]))
        count += found[-1].numel()
        if tokens is not None and count >= tokens:
            break
    ids = torch.cat(found) if found else torch.zeros(0, dtype=torch.long)
    return ids[:tokens]


def tokenize(tokenizer: Any, texts: list[str]) -> Tensor:
    """Token ids (n,) of texts one after the other; takes transformers and tokenizers objects."""
    fast = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(fast, "encode_batch"):
        found = [e.ids for e in fast.encode_batch(texts)]
    else:
        found = [tokenizer.encode(text) for text in texts]
    return torch.tensor([token for ids in found for token in ids], dtype=torch.long)


def check_tokens(model: nn.Module, tokens: Tensor, directory: str | os.PathLike[str]) -> Tensor:
    """The tokens, if the model has a row for each; ValueError otherwise."""
    rows = model.get_input_embeddings().weight.shape[0]
    if tokens.numel() and int(tokens.max()) >= rows:
        raise ValueError(
            f"{directory}: the tokenizer gives token {int(tokens.max())}, the model knows {rows}"
        )
    return tokens


def model_class(transformers: ModuleType, name: Any) -> type | None:
    """The model class of transformers that has this name, if there is one."""
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if known else None


def _class(transformers: ModuleType, config: dict[str, Any], directory: Path) -> Any:
    """The model class that a config names."""
    names = config.get("architectures")
    if not names:
        return transformers.AutoModelForCausalLM
    name = names[0] if isinstance(names, list) else names
    found = model_class(transformers, name)
    if found is None:
        raise ValueError(
            f"{directory}: config.json names the architecture {name!r:.200}, which transformers "
            f"{transformers.__version__} does not have"
        )
    return found


def _dense(kind: Any, directory: Path, dtype: torch.dtype) -> nn.Module:
    try:
        return kind.from_pretrained(str(directory), dtype=dtype, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{directory}: the model cannot be loaded: {first_line(error)}") from error


def _empty(
    transformers: ModuleType,
    config: dict[str, Any],
    dtype: torch.dtype,
    opened: checkpoint.Checkpoint,
) -> nn.Module:
    """The model of a config with memory that is reserved but not filled; `load` fills all of it."""
    from transformers.initialization import no_init_weights

    kind = _class(transformers, config, opened.directory)
    try:
        known = transformers.AutoConfig.for_model(**config)
        make = getattr(kind, "_from_config", None) or kind.from_config
        with no_init_weights():
            model = make(known, dtype=dtype)
    except Exception as error:
        raise ValueError(
            f"{opened.directory}: no model can be built from config.json: {first_line(error)}"
        ) from error
    model.tie_weights()
    generation = opened.directory / "generation_config.json"
    if generation.is_file():
        try:
            settings = transformers.GenerationConfig.from_pretrained(str(opened.directory))
        except Exception as error:
            raise ValueError(f"{generation}: cannot be read: {first_line(error)}") from error
        model.generation_config = settings
    return model


def first_line(error: Exception) -> str:
    """The first line of a message: those of transformers go on for many."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _transformers() -> ModuleType:
    transformers = _import_transformers()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _import_transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"this needs transformers ({error}): pip install reality-stone[hf]"
        ) from None
    return transformers
