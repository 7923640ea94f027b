"""Two parts of a corpus, one to train on and one that is held out."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from s2jax.messages import counted
from training.documents import Corpus, Document, Part
from training.left_out import LeftOut, shown

# A place to cut a text, the best first.
_BREAKS = (re.compile(rb"\n[ \t\r]*\n"), re.compile(rb"\n"), re.compile(rb"[ \t]"))
_NEAR = 4096  # tokens within which a cut may move to such a place; a tenth of what is held out, if that is less
_RECORD = re.compile(r"(#\d+|\[\d+:\d+\])$")  # the place in its file, at the end of a document's name
_SPLITS = {
    word: split
    for split, words in {
        "train": ("train", "training"),
        "validation": ("val", "valid", "validation", "dev", "heldout", "held_out", "held-out"),
        "test": ("test", "testing"),
    }.items()
    for word in words
}
_WORD = re.compile(rf"(?<![^-_.])({'|'.join(sorted(_SPLITS, key=len, reverse=True))})(?![^-_.])")
_SOURCE_CODE = (".py", ".c", ".cc", ".cpp", ".h", ".js", ".ts", ".rs", ".go", ".java", ".rb", ".sh")


def hold_out(corpus: Corpus, fraction: float) -> tuple[Corpus, Corpus]:
    """Splits into (training, held-out) by tokens, the same way on every machine.

    Documents are held out in the order of a hash of their names until they hold `fraction` of the tokens. The document
    that goes beyond is cut and its tail held out: a text after a paragraph, line or word near the place, and never
    within a character.

    Raises:
        ValueError: the corpus is too short to be split.
    """
    least = 3 if corpus.byte_level else 2  # a held-out text must have a byte to predict beside the closing boundary
    documents = corpus.documents
    names = [os.fsencode(document.name) for document in documents]
    ranked = sorted(range(len(documents)), key=lambda i: (hashlib.sha256(names[i]).digest(), names[i]))
    total = corpus.num_tokens
    wanted = min(max(round(fraction * total), least), total - 2)
    cuts = {i: documents[i].length for i in ranked}  # where the held-out tail of each begins
    rest = wanted
    for place, i in enumerate(ranked):
        length = documents[i].length
        if rest < least:
            break
        if length <= rest and place < len(ranked) - 1:
            cuts[i], rest = 0, rest - length
        elif length >= 2 + least:
            cuts[i] = _cut(documents[i], length - rest, least, corpus.byte_level, near=min(_NEAR, rest // 10))
            break
    if all(cuts[i] == documents[i].length for i in ranked):  # all are too short to be cut
        if len(documents) == 1:
            got = counted(documents[0].length, "token")
            raise ValueError(f"--heldout: expected a text long enough to hold a part of it out, got {got}")
        cuts[ranked[0]] = 0
    train = tuple(_before(document, cuts[i]) for i, document in enumerate(documents) if cuts[i])
    heldout = tuple(_after(document, cuts[i]) for i, document in enumerate(documents) if cuts[i] < document.length)
    return replace(corpus, documents=train), replace(corpus, documents=heldout)


def _before(document: Document, cut: int) -> Document:
    return document if cut == document.length else Part(document, 0, cut)


def _after(document: Document, cut: int) -> Document:
    return Part(document, cut, document.length) if cut else document


def _cut(document: Document, ideal: int, least: int, byte_level: bool, near: int) -> int:
    """The place to cut a document: `ideal`, or for a text a better one at most `near` away.

    Args:
        document: of at least `2 + least` tokens.
        ideal: tokens before the cut.
        least: tokens after the cut; before it there are at least two.
        byte_level: True for text.
        near: tokens.
    """
    first, last = 2, document.length - least
    ideal = min(max(ideal, first), last)
    if not byte_level:
        return ideal
    begin = max(ideal - near, first)
    stop = min(ideal + near, last)
    text = document.read(begin, stop).astype(np.uint8).tobytes()  # no boundary: these are the first and last token
    for pattern in _BREAKS:
        if places := [begin + match.end() for match in pattern.finditer(text)]:
            return min(places, key=lambda place: abs(place - ideal))
    return _character_start(document, ideal, first)


def _character_start(document: Document, place: int, first: int) -> int:
    """The start of the UTF-8 character that `place` lies in; `place`, if the text is not UTF-8."""
    for start in range(place, max(place - 4, first - 1), -1):
        if int(document.read(start, start + 1)[0]) & 0xC0 != 0x80:
            return start
    return place


def split(corpus: Corpus, fraction: float, *, by_name: bool) -> tuple[Corpus, Corpus, str]:
    """Splits into (training, held-out), and says how in a few words.

    Args:
        corpus: all documents.
        fraction: share of the tokens to hold out, if no names say which.
        by_name: True takes files named as a validation split for the held-out ones, see `named_splits`.

    Raises:
        ValueError: the corpus is too short to be split.
    """
    named = named_splits(corpus) if by_name else None
    train, heldout = named or hold_out(corpus, fraction)
    share = heldout.num_tokens / (heldout.num_tokens + train.num_tokens)
    size = counted(heldout.num_tokens, "byte" if corpus.byte_level else "token")
    what = _described(heldout)
    if named:
        what = f"{what}, as named (--no-named-splits takes a share instead)"
    return train, heldout, f"{size} ({share:.2%}), {what}"


def _described(heldout: Corpus) -> str:
    whole = [document for document in heldout.documents if not isinstance(document, Part)]
    tails = [document for document in heldout.documents if isinstance(document, Part)]
    said = [f"{counted(len(whole), 'document')}, such as {shown(document.name, 60)}" for document in whole[:1]]
    said += [f"the last {tail.length:,} of {shown(tail.whole.name, 60)}" for tail in tails]
    return " and ".join(said)


def named_splits(corpus: Corpus) -> tuple[Corpus, Corpus] | None:
    """Splits into (training, held-out) by the names of the files, if they are named so.

    That is a file or folder whose name differs from another's in one word alone: `val`, `valid`, `validation`, `dev` or
    `heldout` (else `test`) instead of `train`. Numbers of shards may differ. A test split beside a validation split is
    left out of both.

    Returns:
        None if there is no such pair.
    """
    places = {name: _split_of(name) for name in corpus.files}
    kin = {form for split, form in places.values() if split == "train"}
    files = {
        wanted: {name for name, (split, form) in places.items() if split == wanted and form in kin}
        for wanted in ("validation", "test")
    }
    chosen = files["validation"] or files["test"]
    unused = files["test"] - chosen
    left_out = corpus.left_out
    for name in sorted(unused):
        left_out = left_out.with_more(LeftOut({"of a test split": (1, name)}))
    heldout = [document for document in corpus.documents if _belongs(document, chosen)]
    train = [d for d in corpus.documents if not _belongs(d, chosen) and not _belongs(d, unused)]
    if not train or not heldout:
        return None
    return replace(corpus, documents=tuple(train), left_out=left_out), replace(corpus, documents=tuple(heldout))


def _split_of(name: str) -> tuple[str | None, str]:
    """The split that a file's folder or its own name says, and that name without the word and numbers.

    Source code is of no split, whatever its name.
    """
    path = Path(name.lower())
    if path.suffix in _SOURCE_CODE:
        return None, name
    for place, part in enumerate(path.parts):
        if found := _WORD.search(part):
            last = place == len(path.parts) - 1
            form = re.sub(r"\d+", "0", f"{part[: found.start()]}*{part[found.end() :]}")
            return _SPLITS[found[1]], "/".join([*path.parts[:place], form if last else f"{form}/"])
    return None, name


def _belongs(document: Document, files: set[str]) -> bool:
    return document.name in files or _RECORD.sub("", document.name) in files
