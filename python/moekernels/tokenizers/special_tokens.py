"""The tokens with a role: `bos_token`, `eos_token_id` and the like."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, overload

from tokenizers import AddedToken

from moekernels.tokenizers.encoding import as_list

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ADDITIONAL = "additional_special_tokens"


class _Token:
    """The text of a special token, or None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, tokenizer: None, owner: type) -> _Token: ...
    @overload
    def __get__(self, tokenizer: SpecialTokens, owner: type) -> str | None: ...
    def __get__(self, tokenizer: SpecialTokens | None, owner: type) -> _Token | str | None:
        if tokenizer is None:
            return self
        token = tokenizer._special_tokens[self.name]
        return None if token is None else str(token)

    def __set__(self, tokenizer: SpecialTokens, token: str | AddedToken | None) -> None:
        if token is not None and not isinstance(token, (str, AddedToken)):
            raise TypeError(f"{self.name} must be a string, an AddedToken or None, got {type(token).__name__}")
        tokenizer._special_tokens[self.name] = token


class _TokenId:
    """The id of a special token, or None; setting it sets the token."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.token_name = name.removesuffix("_id")

    @overload
    def __get__(self, tokenizer: None, owner: type) -> _TokenId: ...
    @overload
    def __get__(self, tokenizer: SpecialTokens, owner: type) -> int | None: ...
    def __get__(self, tokenizer: SpecialTokens | None, owner: type) -> _TokenId | int | None:
        if tokenizer is None:
            return self
        token = tokenizer._special_tokens[self.token_name]
        return None if token is None else tokenizer.convert_tokens_to_ids(str(token))

    def __set__(self, tokenizer: SpecialTokens, token_id: int | None) -> None:
        token = None if token_id is None else tokenizer.convert_ids_to_tokens(token_id)
        setattr(tokenizer, self.token_name, token)


class SpecialTokens:
    """Gives a tokenizer its special tokens as attributes, by text and by id."""

    bos_token = _Token()
    eos_token = _Token()
    unk_token = _Token()
    sep_token = _Token()
    pad_token = _Token()
    cls_token = _Token()
    mask_token = _Token()
    bos_token_id = _TokenId()
    eos_token_id = _TokenId()
    unk_token_id = _TokenId()
    sep_token_id = _TokenId()
    pad_token_id = _TokenId()
    cls_token_id = _TokenId()
    mask_token_id = _TokenId()

    def __init__(self, **tokens: Any) -> None:
        self._special_tokens: dict[str, str | AddedToken | None] = dict.fromkeys(NAMES)
        self._additional: list[str | AddedToken] = []
        for name, token in tokens.items():
            setattr(self, name, token)

    # The table that ids come from; a tokenizer defines all four.

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        raise NotImplementedError

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        raise NotImplementedError

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Id to token, of those that are never split."""
        raise NotImplementedError

    def _add_tokens(self, tokens: list[AddedToken]) -> int:
        raise NotImplementedError

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """The same by text, in the order of ids."""
        return {token.content: index for index, token in sorted(self.added_tokens_decoder.items())}

    def get_added_vocab(self) -> dict[str, int]:
        return self.added_tokens_encoder

    @property
    def additional_special_tokens(self) -> list[str]:
        """Special tokens without a role of their own."""
        return [str(token) for token in self._additional]

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Iterable[str | AddedToken] | None) -> None:
        tokens = list(tokens or [])
        if any(not isinstance(token, (str, AddedToken)) for token in tokens):
            raise TypeError(f"{ADDITIONAL} must be strings or AddedTokens, got {tokens!r}")
        self._additional = tokens

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.additional_special_tokens)

    @property
    def special_tokens_map(self) -> dict[str, str | list[str]]:
        """The special tokens that are set, by role."""
        tokens: dict[str, str | list[str]] = {
            name: str(token) for name, token in self._special_tokens.items() if token is not None
        }
        if self._additional:
            tokens[ADDITIONAL] = self.additional_special_tokens
        return tokens

    @property
    def special_tokens_map_extended(self) -> dict[str, Any]:
        """The same, with how a token is matched where that was said."""
        tokens: dict[str, Any] = {name: token for name, token in self._special_tokens.items() if token is not None}
        return {**tokens, ADDITIONAL: list(self._additional)} if self._additional else tokens

    def get_special_tokens_mask(
        self, token_ids_0: Any, token_ids_1: Any = None, already_has_special_tokens: bool = True
    ) -> list[int]:
        """1 for special tokens, 0 for others, of ids that have the special tokens around them."""
        if token_ids_1 is not None:
            raise ValueError("ids that have their special tokens already are one sequence; got token_ids_1 too")
        special = set(self.all_special_ids)
        return [int(token_id in special) for token_id in as_list(token_ids_0)]

    @property
    def all_special_tokens_extended(self) -> list[str | AddedToken]:
        """Every special token once, with how it is matched where that was said."""
        unique: dict[str, str | AddedToken] = {}
        for token in [*self._special_tokens.values(), *self._additional]:
            if token is not None:
                unique.setdefault(str(token), token)
        return list(unique.values())

    @property
    def all_special_tokens(self) -> list[str]:
        return [str(token) for token in self.all_special_tokens_extended]

    @property
    def all_special_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def add_special_tokens(
        self, special_tokens_dict: dict[str, Any], replace_additional_special_tokens: bool = True
    ) -> int:
        """Gives tokens their roles, and adds those that are new to the vocabulary. Returns how many were new.

        Args:
            special_tokens_dict: token by role; `additional_special_tokens` is a list.
            replace_additional_special_tokens: drop the additional ones there are.

        Raises:
            ValueError: a role is unknown.
        """
        unknown = sorted(set(special_tokens_dict) - {*NAMES, ADDITIONAL})
        if unknown:
            raise ValueError(f"special tokens are {', '.join([*NAMES, ADDITIONAL])}; got {', '.join(unknown)}")
        added: list[AddedToken] = []
        for name, value in special_tokens_dict.items():
            tokens = [_special(token) for token in (value if name == ADDITIONAL else [value])]
            if name != ADDITIONAL:
                setattr(self, name, tokens[0])
            elif replace_additional_special_tokens:
                self._additional = list(tokens)
            else:
                self._additional += [token for token in tokens if str(token) not in self.additional_special_tokens]
            added += tokens
        return self._add_tokens(added) if added else 0

    def add_tokens(
        self, new_tokens: str | AddedToken | Iterable[str | AddedToken], special_tokens: bool = False
    ) -> int:
        """Adds tokens that are never split. Returns how many were new."""
        tokens = [new_tokens] if isinstance(new_tokens, (str, AddedToken)) else list(new_tokens)
        if special_tokens:
            return self._add_tokens([_special(token) for token in tokens]) if tokens else 0
        return self._add_tokens([AddedToken(t) if isinstance(t, str) else t for t in tokens]) if tokens else 0


def _special(token: str | AddedToken) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, normalized=False, special=True)
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )
