"""What all tiny checkpoints are made of: a tokenizer of bytes, the sizes of a language model, JSON files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 4, 128, 4, 2, 32
MEAN, DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
HALF = [0.5] * 3
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
"""Sizes of a vision tower."""
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ['image', 'image_url'] %}IMAGE"
    "{% elif part['type'] in ['video', 'video_url'] %}VIDEO"
    "{% elif part['type'] in ['audio', 'audio_url', 'input_audio'] %}AUDIO"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Media:
    """What a chat template writes in the place of a medium."""

    image: str
    video: str = ""
    audio: str = ""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer that was written: numbers of its special tokens, and its size as a model has it."""

    ids: dict[str, int]
    size: int

    def __getitem__(self, token: str) -> int:
        return self.ids[token]


@dataclass
class Checkpoint:
    """A folder that is being written.

    Args:
        folder: emptied first.
        vocabulary: known once the tokenizer is written.
    """

    folder: Path
    vocabulary: Vocabulary = field(init=False)

    def __post_init__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def tokenizer(
        self,
        specials: Sequence[str],
        media: Media,
        *,
        begin: str | None = None,
        pad: str = PAD,
        names: dict[str, str] | None = None,
    ) -> Vocabulary:
        """Write a tokenizer that has a token per byte, and these special ones.

        Args:
            specials: tokens of the model.
            media: what stands in a prompt for an image, a video, an audio.
            begin: a token that begins every prompt.
            pad: which one pads.
            names: attributes by which a processor finds some of `specials`.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokens = list(dict.fromkeys([PAD, START, END, *specials, *([begin] if begin else []), pad]))
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
        template = TEMPLATE.replace("IMAGE", media.image).replace("VIDEO", media.video).replace("AUDIO", media.audio)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=END,
            pad_token=pad,
            bos_token=begin,
            chat_template=(begin or "") + template,
            model_max_length=32768,
            **(names or {}),
        )
        fast.save_pretrained(self.folder)
        self.amend("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", **(names or {}))
        ids = {token: fast.convert_tokens_to_ids(token) for token in tokens}
        self.vocabulary = Vocabulary(ids, (len(fast) + 63) // 64 * 64)
        return self.vocabulary

    def text(self, **more: Any) -> dict[str, Any]:
        """Sizes of the language model, under the names that most families use."""
        ids = self.vocabulary
        return {
            "vocab_size": ids.size,
            "hidden_size": HIDDEN,
            "intermediate_size": 256,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 32768,
            "bos_token_id": ids[START],
            "eos_token_id": ids[END],
            "pad_token_id": ids[PAD],
            "tie_word_embeddings": False,
            **more,
        }

    def config(self, config: Any, architecture: str, **more: Any) -> None:
        """Write config.json.

        Args:
            config: of transformers, or a dict.
            architecture: the class that SGLang looks for.
            more: replaces what `config` says.
        """
        values = config if isinstance(config, dict) else json.loads(config.to_json_string(use_diff=False))
        values = {**values, "architectures": [architecture], **more}
        values.pop("_name_or_path", None)
        self.json("config.json", values)
        self.json("generation_config.json", {"do_sample": False})

    def images(self, kind: str, **settings: Any) -> None:
        """Write the image processor's settings; `kind` is its class."""
        self.json("preprocessor_config.json", {"image_processor_type": kind, **settings})

    def videos(self, kind: str, **settings: Any) -> None:
        """Write the video processor's settings; `kind` is its class."""
        self.json("video_preprocessor_config.json", {"video_processor_type": kind, **settings})

    def processor(self, kind: str, **settings: Any) -> None:
        """Write the settings of what puts tokenizer and image processor together."""
        self.json("processor_config.json", {"processor_class": kind, **settings})

    def json(self, name: str, values: dict[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(values, indent=1) + "\n")

    def amend(self, name: str, **values: Any) -> None:
        """Add to a JSON file that is there."""
        self.json(name, {**json.loads((self.folder / name).read_text()), **values})
