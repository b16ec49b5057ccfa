"""A steered model for lm-evaluation-harness (`pip install "lm_eval[hf]"`): what steering costs on
MMLU, TruthfulQA, GSM8K and the like.

    python -m saesteer_fast.eval.harness run --model saesteer \\
        --model_args pretrained=microsoft/Phi-3-mini-4k-instruct,steering=refuse.json \\
        --tasks mmlu,truthfulqa_mc2,gsm8k

The command is `lm_eval`, which does not know the model by itself. In Python, SteeredHF(pretrained=
model or name, steering=file or Recipe) goes wherever lm_eval takes an LM.
"""

from __future__ import annotations

from collections.abc import Iterator

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'saesteer_fast.eval.harness needs {error.name}: pip install "lm_eval[hf]"'
    ) from error

from ..conditions import split
from ..recipe import Recipe, load_steering
from ..scopes import Scoped


@register_model("saesteer")
class SteeredHF(HFLM):
    """lm_eval's HFLM whose model is steered for all that it is asked.

    steering     a steering file, as load_steering reads it, or a Recipe
    the others   HFLM's

    Raises what load_steering and Recipe.attach do, and ValueError for what would steer otherwise
    than it says: configurations by row and masks, since the harness makes its own batches; a cache
    of answers, which does not know by which steering they came; and, where given answers are
    scored, what depends on the prompt's end, since prompt and answer then come as one sequence.
    """

    def __init__(self, pretrained, steering: str | Recipe, **arguments):
        recipe = steering if isinstance(steering, Recipe) else load_steering(steering)
        for what in _of_a_batch(recipe):
            raise ValueError(f"{what}: the harness makes its own batches; leave it out")
        self._of_prompts = [*_of_prompts(recipe)]
        super().__init__(pretrained, **arguments)
        self.handles = recipe.attach(self.model)

    def set_cache_hook(self, cache_hook) -> None:
        raise ValueError(
            "use_cache: answers are kept by the question alone, and would come back whatever the "
            "steering; leave it out"
        )

    def _loglikelihood_tokens(self, *arguments, **options) -> list[tuple[float, bool]]:
        for what in self._of_prompts:
            raise ValueError(
                f"{what} depends on where a prompt ends, which is not known where given answers "
                'are scored; accepted there: scope "all", positions from the start, not_tokens; '
                "when=active; tasks that generate take all"
            )
        return super()._loglikelihood_tokens(*arguments, **options)


def _of_a_batch(recipe: Recipe) -> Iterator[str]:
    """What names rows of a batch, by its place."""
    for place, step in enumerate(recipe.steerings):
        yield from (f"steerings[{place}].{name}" for name in step.of_a_batch())
        if step.is_table:
            yield f"steerings[{place}].edits"


def _of_prompts(recipe: Recipe) -> Iterator[str]:
    """What needs to know where a prompt ends, by its place."""
    for place, step in enumerate(recipe.steerings):
        if Scoped(step.scope).turn is not None:
            yield f"steerings[{place}].scope"
        if split(step.when)[1]:
            yield f"steerings[{place}].when"


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
