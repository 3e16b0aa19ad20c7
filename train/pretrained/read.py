"""Reads a pretrained model of either kind."""

from pathlib import Path

from train.pretrained import gguf_file, hugging_face
from train.pretrained.hugging_face import Pretrained


def read(source: Path) -> Pretrained:
    """The model in a Hugging Face folder or a GGUF file.

    Raises:
      ValueError: it cannot be read; see the modules of both kinds.
    """
    if source.is_dir():
        return hugging_face.read(source)
    if source.suffix == ".safetensors" and source.is_file():
        raise ValueError(f"source = {source}: expected the folder around it, with config.json and tokenizer.json")
    if source.is_file():
        return gguf_file.read(source)
    raise ValueError(
        f"source = {source}: expected a Hugging Face folder or a GGUF file, and there is nothing. A model of the "
        "Hugging Face Hub comes into a folder with `hf download OWNER/NAME --local-dir FOLDER`"
    )
