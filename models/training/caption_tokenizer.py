"""A CLIPTokenizer in which every caption word is one token and every other word falls back to bytes.

Byte-pair encoding (Sennrich et al. 2016) over CLIP's byte alphabet. Merges are not learned but written down: for each
word, whatever pieces the merges so far leave are joined from left to right. Later merges rank lower, so they cannot
break a word that earlier ones complete.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from transformers import CLIPTokenizer

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 32


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes that byte-level BPE uses, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    stand_in, following = {}, 256
    for byte in range(256):
        if byte in printable:
            stand_in[byte] = chr(byte)
        else:
            stand_in[byte] = chr(following)
            following += 1
    return [stand_in[byte] for byte in range(256)]


def split(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """The pieces the merges leave of a word, the last one ending in </w>."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        pairs = list(itertools.pairwise(pieces))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        at = pairs.index(best)
        pieces[at : at + 2] = ["".join(best)]
    return pieces


def build_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """A tokenizer with real begin, end and padding ids; captions are padded to MAX_LENGTH."""
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    ranks: dict[tuple[str, str], int] = {}
    for word in sorted(set(words)):
        pieces = split(word, ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            tokens.append(pieces[0] + pieces[1])
            pieces = split(word, ranks)
    vocabulary = {token: index for index, token in enumerate([*dict.fromkeys(tokens), BEGIN, END])}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=list(ranks),
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=MAX_LENGTH,
    )
