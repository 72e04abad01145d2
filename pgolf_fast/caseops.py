"""CaseOps: text to lower case plus four operators, and back, character for character.

Only the ASCII letters take part; every other character is copied and separates words. The operators are private-use characters:

    TITLE    the next word starts with a capital       The    ->  TITLE the
    ALLCAPS  the next word is all capitals             NASA   ->  ALLCAPS nasa
    CAPNEXT  the next letter is a capital              iPhone ->  i CAPNEXT phone
    ESCAPE   the next character stands for itself      an operator that was in the text

    decode(encode(text)) == text     for every valid Unicode string

`encode` and `decode` are the C++ of csrc/host/caseops.cpp; `encode_ref` and `decode_ref` say the same in plain Python.
"""

import re

import numpy as np

from pgolf_fast.host import host

TITLE, ALLCAPS, CAPNEXT, ESCAPE = OPERATORS = "\ue001\ue002\ue003\ue004"

_SURROGATE = "{}: a lone surrogate at index {} has no UTF-8 form; replace it first"
_LETTER = re.compile("[A-Za-z]")
_ACTION = re.compile(f"{ESCAPE}(?P<literal>.?)|{ALLCAPS}(?P<word>[a-z]*)|[{TITLE}{CAPNEXT}](?P<letter>[a-z]?)", re.DOTALL)
_RUN_OR_OPERATOR = re.compile(f"[A-Za-z]+|[{OPERATORS}]")


def encode(text: str) -> str:
    """`text` in lower case, with operators that say where its capitals were."""
    try:
        return host.caseops_encode(text)
    except UnicodeEncodeError as error:
        raise ValueError(_SURROGATE.format("text", error.start)) from None


def decode(encoded: str) -> str:
    """The text that `encode` was given; ValueError where `encode` could not have written what stands there."""
    try:
        return host.caseops_decode(encoded)
    except UnicodeEncodeError as error:
        raise ValueError(_SURROGATE.format("encoded", error.start)) from None


def decode_lenient(encoded: str) -> str:
    """`decode` for text that may have lost characters since it was encoded (a tokenizer's normalisation) or that a model wrote: an
    operator without a letter to act on does nothing."""
    return _ACTION.sub(lambda match: match["literal"] or (match["word"] or match["letter"] or "").upper(), encoded)


def span_bytes(encoded: bytes, begin: int, ends: np.ndarray) -> np.ndarray:
    """Original UTF-8 bytes in each of the adjoining spans of `encoded` that start at byte `begin` and stop at `ends`: an operator
    counts none of its own, an escaped one its three."""
    return host.caseops_span_bytes(encoded, begin, ends)


def encode_ref(text: str) -> str:
    return _RUN_OR_OPERATOR.sub(lambda match: _encode_run_ref(match[0]), text)


def _encode_run_ref(run: str) -> str:
    if run in OPERATORS:
        return ESCAPE + run
    if run.islower():
        return run
    if len(run) >= 2 and run.isupper():
        return ALLCAPS + run.lower()
    head = TITLE if run[0].isupper() else ""
    if run[1:].islower() or len(run) == 1:
        return head + run.lower()
    return head + run[0].lower() + "".join(CAPNEXT + c.lower() if c.isupper() else c for c in run[1:])


def decode_ref(encoded: str) -> str:
    text = []
    pending_escape = pending_cap = in_word = is_all_caps = False
    pending_mode = None
    for index, c in enumerate(encoded):
        is_letter = _LETTER.fullmatch(c) is not None

        def require(condition, problem, index=index):
            if not condition:
                raise ValueError(f"encoded: character {index}: {problem}")

        if pending_escape:
            require(pending_mode is None or is_letter, "TITLE or ALLCAPS is not followed by a letter")
            text.append(c)
            pending_escape = False
            in_word = is_letter
            is_all_caps = is_all_caps and is_letter
        elif c == ESCAPE:
            pending_escape = True
        elif c in (TITLE, ALLCAPS):
            require(pending_mode is None and not in_word and not pending_cap, "TITLE or ALLCAPS inside a word or after another operator")
            pending_mode = c
        elif c == CAPNEXT:
            require(not pending_cap, "CAPNEXT twice")
            pending_cap = True
        elif is_letter and not in_word:
            text.append(c.upper() if pending_mode or pending_cap else c)
            is_all_caps = pending_mode == ALLCAPS
            pending_mode, pending_cap, in_word = None, False, True
        elif is_letter:
            require(pending_mode is None, "TITLE or ALLCAPS inside a word")
            text.append(c.upper() if is_all_caps or pending_cap else c)
            pending_cap = False
        else:
            require(pending_mode is None and not pending_cap, "an operator is not followed by a letter")
            text.append(c)
            in_word = is_all_caps = False
    if pending_escape or pending_mode or pending_cap:
        raise ValueError("encoded: the text ends after an operator")
    return "".join(text)
