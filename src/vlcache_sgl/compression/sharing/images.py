"""What is known of pictures that requests share: which copy is current, what it lacks, who is making a better one.

A picture is named by all tokens up to its end, the user's key and salt, and the policy.  Its copies are *generations*:
each has a namespace of its own in the radix tree, so that a new copy replaces the old one for everybody who comes later
while requests that run keep the old one to their end.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlcache_sgl.api import Span
from vlcache_sgl.compression.sharing.sketch import KeySketch

MOST_PICTURES = 65536
"""Pictures that are remembered; the one that was asked about longest ago is forgotten first."""
LEVELS = 3
"""Times a copy is made anew: with the new needs inside the share budget, in twice that budget, whole."""


@dataclass(frozen=True)
class PrefixSketch:
    """What one eviction removed from one stretch of a prompt; layers of which nothing is to be known are missing."""

    generation: int
    end: int
    """Position behind the stretch."""
    groups: tuple[tuple[tuple[int, ...], KeySketch], ...]
    """Layers that lack equally many tokens, with one sketch of the heads of all of them, layer after layer: reading
    them at once costs little more than reading one."""

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes for _, keys in self.groups)


@dataclass(frozen=True)
class StaleCopy:
    """A copy that was replaced: its cells can go as soon as nobody reads them."""

    tokens: Any
    """Token numbers up to the end of the picture, SGLang's array."""
    span: Span
    """The picture's."""
    extra_key: str | None
    cache_salt: str | None


@dataclass
class SharedImage:
    """The first picture of a prompt, as all its requests see it."""

    number: int
    """Distinguishes it in the radix tree."""
    generation: int = 0
    """Of the copy that new requests find."""
    level: int = 0
    """How often it was found lacking, at most `LEVELS`: decides how much the next copy keeps."""
    leader: Any = None
    """The request that makes the next copy, SGLang's object; None: nobody does."""
    tripped: int = 0
    """Questions that found the current copy lacking."""
    forgotten: bool = False
    """Whether requests that still name it are the last to do so."""
    stale: list[StaleCopy] = field(default_factory=list)
    sketches: dict[bytes, PrefixSketch] = field(default_factory=dict)
    """Of the current copy and what follows it in prompts, by the tokens up to their end."""

    @property
    def settled(self) -> bool:
        """Whether it is kept whole from now on."""
        return self.level >= LEVELS

    def budget(self, share: float) -> float:
        """Share of a picture that a copy at the present level keeps, in (0, 1]."""
        if self.settled:
            return 1.0
        return min(1.0, share * 2.0 ** max(0, self.level - 1))

    def namespace(self, generation: int) -> str:
        """What the radix key of a request for this generation ends with; the first one is shared with other pictures,
        and with it a system prompt."""
        return f"#{self.number}.{generation}" if generation else ""


class SharedImages:
    """All pictures of one scheduler process."""

    def __init__(self) -> None:
        self._images: OrderedDict[bytes, SharedImage] = OrderedDict()
        self._created = 0
        self.sketch_bytes = 0
        """Bytes of all sketches."""
        self.settled = 0
        """Pictures that are kept whole from now on."""
        self._replaced: dict[int, SharedImage] = {}
        """Pictures with copies that still hold cells."""

    def find(self, tokens: Sequence[int], first_end: int, namespace: tuple[str | None, ...]) -> SharedImage:
        """The picture that ends at `first_end` in the prompt `tokens`; a new one if it is not known.

        Args:
            namespace: the user's key and salt, and the fingerprint of policy and share mode.
        """
        key = prefix_digest(tokens, first_end, repr(namespace).encode())
        image = self._images.get(key)
        if image is None:
            self._created += 1
            image = self._images[key] = SharedImage(self._created)
            if len(self._images) > MOST_PICTURES:
                self._forget_one()
        self._images.move_to_end(key)
        return image

    def learn(self, image: SharedImage) -> None:
        """The next copy of `image` is about to be chosen: by how often the present one was found lacking."""
        before = image.settled
        image.level = min(LEVELS, image.level + max(1, image.tripped))
        self.settled += image.settled - before

    def remember(self, image: SharedImage, digest: bytes, sketch: PrefixSketch, most_bytes: int) -> None:
        """Keep a sketch; the oldest pictures lose theirs until all of them take at most `most_bytes`."""
        if image.forgotten:
            return
        self._drop(image, digest)
        image.sketches[digest] = sketch
        self.sketch_bytes += sketch.nbytes
        for other in self._images.values():
            if self.sketch_bytes <= most_bytes:
                return
            for known in list(other.sketches):
                self._drop(other, known)

    def _drop(self, image: SharedImage, digest: bytes) -> None:
        sketch = image.sketches.pop(digest, None)
        self.sketch_bytes -= sketch.nbytes if sketch is not None else 0

    def replaced(self, image: SharedImage, copy: StaleCopy) -> None:
        """The leader has published the next generation of `image`; `copy` is the one before."""
        image.generation += 1
        image.tripped = 0
        image.leader = None
        image.stale.append(copy)
        for digest, sketch in list(image.sketches.items()):
            if sketch.generation != image.generation:
                self._drop(image, digest)
        self._replaced[image.number] = image

    def with_stale(self) -> list[SharedImage]:
        """Pictures with replaced copies that still hold cells."""
        self._replaced = {number: image for number, image in self._replaced.items() if image.stale}
        return list(self._replaced.values())

    def _forget_one(self) -> None:
        """Drop the oldest that nobody is making a copy of."""
        for key, image in self._images.items():
            if image.leader is None and not image.stale:
                for digest in list(image.sketches):
                    self._drop(image, digest)
                self.settled -= image.settled
                image.forgotten = True
                del self._images[key]
                return

    def __iter__(self) -> Iterator[SharedImage]:
        return iter(self._images.values())

    def __len__(self) -> int:
        return len(self._images)

    def clear(self) -> None:
        """The prefix cache was flushed."""
        self._images.clear()
        self._replaced.clear()
        self.sketch_bytes = self.settled = 0


def prefix_digest(tokens: Sequence[int], end: int, begin: bytes = b"") -> bytes:
    """Names ``tokens[:end]``; pictures differ in the numbers that SGLang gives their tokens."""
    digest = hashlib.blake2b(begin, digest_size=16)
    digest.update(array("q", tokens[:end]))
    return digest.digest()
