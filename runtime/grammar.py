"""Answers that follow a JSON schema, a regular expression or a list: what may come next, token by token.

llguidance keeps the state of the grammar; see https://github.com/guidance-ai/llguidance. It is an extra: without it an
answer that is asked for in this way is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from owl2.runtime.errors import ConfigError
from owl2.runtime.foreign import cut
from owl2.runtime.sampling import GenerationConfig

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

JSON_STYLE = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
"""One way to write JSON: with free blanks, a weak model may write nothing else."""


class Grammar:
    """The grammar of one answer: what was generated so far decides what may follow."""

    def __init__(self, matcher: LLMatcher) -> None:
        """Begin an answer; :meth:`GrammarCompiler.compile` is the usual way."""
        self._matcher = matcher

    def allowed(self, count: int) -> NDArray[np.bool_]:
        """Which of so many tokens may follow: [V], at least one.

        Raises:
            ConfigError: the grammar has become too complex.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ConfigError(f"the answer can no longer follow its grammar: {cut(self._matcher.get_error(), 300)}")
        return np.unpackbits(bits, count=count, bitorder="little").astype(bool)

    def accept(self, token: int) -> None:
        """Say that a token was chosen."""
        self._matcher.consume_token(token)


class GrammarCompiler:
    """Makes grammars for one tokenizer."""

    def __init__(self, surfaces: tuple[bytes, ...], special_ids: tuple[int, ...], end_id: int) -> None:
        """Prepare a tokenizer, which takes a moment.

        Args:
            surfaces: bytes of every id.
            special_ids: those that stand for no text.
            end_id: ends an answer.

        Raises:
            ConfigError: llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError as error:
            raise ConfigError("schema, regex and choices need another package: pip install 'owl2[grammar]'") from error
        self._llguidance = llguidance
        wrapper = _Wrapper(surfaces, special_ids, end_id)
        self._tokenizer: LLTokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(wrapper), n_vocab=len(surfaces), eos_token=end_id
        )

    def compile(self, config: GenerationConfig) -> Grammar:
        """The grammar that a config asks for.

        Raises:
            ConfigError: it is not a valid schema or expression.
        """
        grammar = self._llguidance.LLMatcher.grammar_from_lark(lark(config))
        matcher = self._llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            name = "schema" if config.schema is not None else "regex" if config.regex is not None else "choices"
            raise ConfigError(f"{name} cannot be followed: {cut(matcher.get_error(), 300)}")
        return Grammar(matcher)


class _Wrapper:
    """A tokenizer as llguidance wants it.

    Where a grammar forces what follows, it asks for the tokens. They are the longest that fit, not those of
    sentencepiece, which would begin with a space.
    """

    def __init__(self, surfaces: tuple[bytes, ...], special_ids: tuple[int, ...], end_id: int) -> None:
        self.tokens, self.special_token_ids = list(surfaces), list(special_ids)
        self.eos_token_id, self.bos_token_id = end_id, None
        self._ids = {surface: token for token, surface in reversed(list(enumerate(surfaces))) if surface}
        self._longest = max(map(len, surfaces))

    def __call__(self, text: bytes) -> list[int]:
        tokens, at = [], 0
        while at < len(text):
            lengths = range(min(self._longest, len(text) - at), 0, -1)
            length = next((length for length in lengths if text[at : at + length] in self._ids), None)
            if length is None:
                break  # a vocabulary without all bytes
            tokens.append(self._ids[text[at : at + length]])
            at += length
        return tokens


def lark(config: GenerationConfig) -> str:
    """The grammar of a config in llguidance's language.

    The answer has a space in front, which decoding removes: that is how this tokenizer begins a text. JSON, which never
    begins with a space itself, may go without.
    """
    if config.schema is not None:
        schema: Mapping[str, Any] = {**JSON_STYLE, **config.schema}
        return f"start: / ?/ answer\nanswer: %json {json.dumps(schema)}\n"
    if config.regex is not None:
        return f'start: " " answer\nanswer: /{_escaped(config.regex)}/\n'
    words = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in config.choices)
    return f'start: " " answer\nanswer: {words}\n'


def _escaped(regex: str) -> str:
    """A regular expression between slashes."""
    escaped, plain = "", True
    for character in regex:
        escaped += "\\/" if character == "/" and plain else "\\n" if character == "\n" else character
        plain = not (character == "\\" and plain)
    return escaped
