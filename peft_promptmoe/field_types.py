# SPDX-License-Identifier: Apache-2.0
"""Types of config fields that take two kinds of values.

Type checkers see the exact type. At run time the type is one that transformers' `HfArgumentParser` can parse: it
supports choices (`Literal`) and `X | None`, and calls any other type with the text of the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal


class NumberOr:
    """Parser of a number or one of a few words.

    Args:
        number: type of the number, int or float.
        words: the words that are allowed.
    """

    def __init__(self, number: type, *words: str) -> None:
        self.number, self.words = number, words

    def __call__(self, text: str) -> Any:
        return text if text in self.words else self.number(text)

    def __repr__(self) -> str:
        return f"{self.number.__name__} | Literal[{', '.join(map(repr, self.words))}]"


if TYPE_CHECKING:
    Layers = list[int] | int | None
    ImageSize = int | list[int] | None
    Spread = float | Literal["match"]
    StaticLayers = int | Literal["all"]
    Experts = list[Any]
    TokenIds = list[int] | dict[str, list[int]] | None
else:
    Layers = list[int] | None
    ImageSize = list[int] | None
    Spread = NumberOr(float, "match")
    StaticLayers = NumberOr(int, "all")
    Experts = list[str]
    TokenIds = list[int] | None
