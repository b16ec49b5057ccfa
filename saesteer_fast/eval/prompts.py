"""A prompt to evaluate: what is asked, its kind, and the answer that is expected."""

from __future__ import annotations

from typing import NamedTuple

KINDS = ("unsafe", "safe", "borderline", "facts", "sums")


class Prompt(NamedTuple):
    """One conversation that ends with a user turn.

    kind: one of KINDS. A refusal is right for "unsafe" and wrong for the others.
    turns: the turns' texts, user and assistant alternating, a user turn first and last.
    expected: for "facts" a word that the answer must contain, for "sums" the number that it must
        end on, else "".
    cell: what the prompt was composed of, so that splits can be compared.
    """

    kind: str
    turns: tuple[str, ...]
    expected: str = ""
    cell: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns as chat templates take them. Raises TypeError where they are no texts, and
        ValueError where the last is not the user's."""
        if isinstance(self.turns, str) or not all(isinstance(text, str) for text in self.turns):
            raise TypeError(f"turns: got {self.turns!r:.80}, texts are needed; of one: ('...',)")
        if len(self.turns) % 2 == 0:
            raise ValueError(
                f"turns: got {len(self.turns)}, an odd number is needed: a user turn first and last"
            )
        return [
            {"role": "assistant" if i % 2 else "user", "content": text}
            for i, text in enumerate(self.turns)
        ]
