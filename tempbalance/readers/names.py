"""Names: what a parameter's name says that it is, where no reader speaks of it.

Authors of models name tokens, positions, scales and temperatures alike. Such a parameter holds no
matrix, whatever its shape, and is listed for what it is.
"""

from __future__ import annotations

import enum
import functools
import re

from torch import nn


class Role(enum.Enum):
    """What a parameter is for; the value is the reason why it is not measured."""

    NORM = "a normalization vector has no spectrum"
    POSITION = "a position embedding is a table of vectors, not a matrix"
    TOKEN = "a learned token or query is an embedding, not a matrix"
    TABLE = "an embedding or codebook is a table of vectors, not a matrix"
    TEMPERATURE = "a temperature is a number a head or model and has no spectrum"
    SCALE = "a scale (a number a channel or layer) has no spectrum"
    STATE = "rates of a recurrence act on each channel alone and have no spectrum"
    ATTENTION = "attention vectors, one a head, have no spectrum"
    BIAS = "a bias or vector has no spectrum"


def _word(words: str) -> re.Pattern[str]:
    """One of some words in a name of words between underscores."""
    return re.compile(rf"(.*_)?({words})(_.*)?", re.IGNORECASE)


# The first that fits counts: a relative position bias is a table of positions first of all.
_ROLES = [
    (
        Role.POSITION,
        _word(r"pos|pe|position\w*|rel|relative|rpb|\w*pos_?emb\w*|time_?emb\w*|seg_?emb\w*"),
    ),
    (
        Role.TOKEN,
        _word(
            r"\w*tokens?|cls|query|queries|latents?|prompts?|probe|anchors?|seed|slots?"
            r"|mask_?emb\w*|masked_\w+|class_emb\w*|newline|separator"
        ),
    ),
    (
        Role.TABLE,
        _word(r"emb|embeds?|embeddings?|\w*table|codebooks?|codevectors|prototypes|centroids?"),
    ),
    (Role.TEMPERATURE, _word(r"temperatures?|temp|tau|logit_scale|logit_bias")),
    (
        Role.SCALE,
        _word(
            r"(layer_?)?scales?|scaling|gammas?\d*|ls\d*|lambdas?\w*|alphas?\d*|betas?\d*|gains?"
            r"|eps|magnitude|(time_)?(mix|maa)_\w+|sinks?|comp"
        ),
    ),
    (Role.STATE, re.compile(r"A_?logs?|[AD]s?|dt\w*|time_(decay|first|faaaa)|h0|c0")),
    (Role.ATTENTION, _word(r"atts?")),
    (Role.BIAS, re.compile(r"(.*_)?(bias\w*)|b\d*", re.IGNORECASE)),
]
_MATRIX = _word(r"weights?\d*|kernels?\d*|proj\d*|projection|matrix|w[a-z]?\d*|v1")
_NO_MATRIX = [
    (Role.POSITION, _word("pos|position|relative")),
    (Role.SCALE, re.compile(r".*_scales?(_inv)?", re.IGNORECASE)),
    (Role.BIAS, re.compile(r".*_bias(es)?", re.IGNORECASE)),
]


def role(module: nn.Module, name: str) -> Role | None:
    """What a parameter is, by its own name and its module's type; None where neither tells.

    Args:
        module: the module that holds it.
        name: its name there.
    """
    return _role(type(module).__name__.lower(), name)


@functools.lru_cache(maxsize=4096)  # a model repeats its blocks
def _role(kind: str, name: str) -> Role | None:
    if re.search(r"norm(1d|2d|3d)?$", kind):
        return Role.NORM
    if re.fullmatch(r"(layer|channel|learned|learnable|soft)?_?scale(1d|2d)?", kind):
        return Role.SCALE
    if name == "weight" and re.search(r"embedding(1d|2d)?$", kind):
        return Role.TABLE
    # The words of a matrix weigh more than all but a few: a query_proj is no query.
    known = _NO_MATRIX if is_weight(name) else _ROLES
    return next((role for role, pattern in known if pattern.fullmatch(name)), None)


def is_weight(name: str) -> bool:
    """Whether a name is one that authors give to weight matrices: weight, q_proj, kernel, w1."""
    return _MATRIX.fullmatch(name) is not None


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization layer: named so, with parameters that are vectors."""
    named = "norm" in type(module).__name__.lower()
    return named and all(p.ndim <= 1 for p in module.parameters())
