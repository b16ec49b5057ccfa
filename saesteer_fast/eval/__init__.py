"""Evaluation of a steered model: whom it refuses, and what it still knows."""

from .judge import REFUSAL_PHRASES, is_refusal, judge
from .prompts import KINDS, Prompt
from .report import json_rows, plot, table
from .scores import Share, wilson
from .suite import COLUMNS, ENOUGH, answers, chat_text, evaluate, prompt_ids, sweep, tally

__all__ = [
    "COLUMNS",
    "ENOUGH",
    "KINDS",
    "REFUSAL_PHRASES",
    "Prompt",
    "Share",
    "answers",
    "chat_text",
    "evaluate",
    "is_refusal",
    "json_rows",
    "judge",
    "plot",
    "prompt_ids",
    "sweep",
    "table",
    "tally",
    "wilson",
]
