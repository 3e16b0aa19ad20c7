"""Continues a prompt with the model of a run: `python -m train generate --run FOLDER --prompt TEXT`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from train.checkpoints.saved import load_model
from train.data import chat
from train.generation.generator import Generator
from train.generation.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Continues a prompt with the model of a run."""

    run: Path  # the run's folder
    prompt: str = ""  # the text to continue
    chat: bool = False  # the prompt is what a user says, to a model trained on conversations; prints the answer
    num_samples: int = 1  # continuations, with seeds from `seed` on
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()


def generate(arguments: Arguments) -> None:
    """Prints the continuation of a prompt as it is made, or several one after the other.

    Raises:
      ValueError: there is no such run, or a setting is impossible.
      CheckpointError: the run has no checkpoint that can be read.
    """
    if arguments.num_samples < 1:
        raise ValueError(f"num_samples = {arguments.num_samples}: expected at least 1")
    config, tokenizer, model, params = load_model(arguments.run)
    sampling, prompt = arguments.sampling, [tokenizer.bos_id, *tokenizer.encode(arguments.prompt).tolist()]
    if arguments.chat:
        prompt = chat.encode_prompt([chat.Message("user", arguments.prompt)], tokenizer, config.data)
        end = tokenizer.encode_marker(config.data.chat_end).tolist()
        sampling = dataclasses.replace(
            sampling,
            stop=(*sampling.stop, config.data.chat_end),
            # A special token has no text that could be found.
            stop_tokens=(*sampling.stop_tokens, *(end if len(end) == 1 else ())),
        )
    generator = Generator(params, model, tokenizer, slots=1, max_length=len(prompt) + sampling.max_tokens)
    for number in range(arguments.num_samples):
        generator.submit(prompt, dataclasses.replace(sampling, seed=sampling.seed + number))
        print("" if arguments.chat else arguments.prompt, end="", flush=True)
        while generator.busy:
            for piece in generator.step():
                print(piece.text, end="", flush=True)
        print()
