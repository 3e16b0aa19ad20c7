"""The chat template that came with a pretrained model: a program in Jinja, which writes a conversation down.

The trainer's own template (`train.data.chat`) serves models that it has trained. A run with `chat_template.json` in its
folder talks by what is there.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from train.config import TrainConfig
from train.data.chat import LAYOUTS, Message
from train.data.tokenizer import HuggingFaceTokenizer
from train.run_folder import write

FILE = "chat_template.json"  # in a run's folder


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens that it may name."""

    template: str
    bos_token: str | None
    eos_token: str | None  # with which an answer ends

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation as text, up to where the answer begins.

        Raises:
          ValueError: the template is wrong, or does not take such a conversation.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        # With these settings templates are written for transformers.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        try:
            return environment.from_string(self.template).render(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                add_generation_prompt=True,
                raise_exception=refuse,
                bos_token=self.bos_token or "",
                eos_token=self.eos_token or "",
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the model's chat template does not take this conversation: {error}") from error

    def encode_prompt(self, messages: Sequence[Message], tokenizer: HuggingFaceTokenizer) -> list[int]:
        """The prompt that the model continues with its answer, as token ids.

        Raises:
          ValueError: as `render`; or a message has the text of a special token, which would be taken for one.
        """
        for message in messages:
            if found := tokenizer.special_token_in(message.content):
                raise ValueError(f"prompt has {found!r}: expected text without the model's special tokens")
        return tokenizer.encode_markup(self.render(messages)).tolist()


def save(template: ChatTemplate, run: Path) -> None:
    """Writes a template into a run's folder."""
    write(run / FILE, json.dumps(dataclasses.asdict(template), indent=2) + "\n")


def inherit(config: TrainConfig) -> None:
    """Keeps the template of `init_from` for a run that learns no conversations, which it would write down otherwise."""
    if config.init_from is None or config.data.format in LAYOUTS or (config.run_dir / FILE).exists():
        return
    template = load(config.init_from)
    if template is not None:
        save(template, config.run_dir)


def load(run: Path) -> ChatTemplate | None:
    """The template in a run's folder; None where there is none.

    Raises:
      ValueError: it cannot be read.
    """
    if not (run / FILE).is_file():
        return None
    try:
        return ChatTemplate(**json.loads((run / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{run / FILE}: expected a chat template as import wrote it, but {error}") from error
