"""From a request's body to sampling parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nybble.core.errors import ConfigError
from nybble.core.sampling import MAX_SEED, RequestOutputKind, SamplingParams, StructuredOutputsParams
from nybble.serve.errors import ApiError
from nybble.serve.openai.schemas import ResponseFormat, Sampling
from nybble.serve.settings import ServeSettings

# The same name and meaning here and there.
_SAME = (
    "n", "presence_penalty", "frequency_penalty", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "min_tokens", "stop", "stop_token_ids", "allowed_token_ids", "bad_words", "ignore_eos",
    "include_stop_str_in_output", "skip_special_tokens",
)  # fmt: skip


def sampling_params(
    body: Sampling,
    settings: ServeSettings,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    response_format: ResponseFormat | None = None,
    forced: StructuredOutputsParams | None = None,
    skip_special_tokens: bool | None = None,
    preset: Mapping[str, Any] | None = None,
) -> SamplingParams:
    """The parameters of a body. preset: those of SamplingParams that count where it says nothing.

    Raises:
        ApiError: 400 that names the field which cannot be used.
    """
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > settings.max_stop_strings:
        raise ApiError(400, f"there are more than {settings.max_stop_strings} stop strings", param="stop")
    if any(len(text) > settings.max_stop_chars for text in stops):
        raise ApiError(400, f"a stop string has more than {settings.max_stop_chars} characters", param="stop")
    if (body.n or 1) > settings.max_n:
        raise ApiError(400, f"n must be at most {settings.max_n}", param="n")
    values: dict[str, Any] = dict(preset or {})
    values |= {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    if body.seed is not None:
        values["seed"] = body.seed & MAX_SEED  # clients send negative ones
    if body.logit_bias:
        values["logit_bias"] = _bias(body.logit_bias)
    if skip_special_tokens is not None:
        values["skip_special_tokens"] = skip_special_tokens
    values["structured_outputs"] = _structured(body, response_format, forced)
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            output_kind=RequestOutputKind.DELTA,
            **values,
        )
    except ConfigError as error:
        name = str(error).split()[0]
        raise ApiError(400, str(error), param=name if name in Sampling.model_fields else None) from None


def _bias(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token_id): value for token_id, value in given.items()}
    except ValueError:
        raise ApiError(400, "the keys of logit_bias must be token ids", param="logit_bias") from None


def _structured(
    body: Sampling, response_format: ResponseFormat | None, forced: StructuredOutputsParams | None
) -> StructuredOutputsParams | None:
    asked = []
    if forced is not None:
        asked.append(forced)
    if response_format is not None and response_format.type == "json_object":
        asked.append(StructuredOutputsParams(json_object=True))
    if response_format is not None and response_format.type == "json_schema":
        schema = response_format.json_schema
        if schema is None or not isinstance(schema.schema_, dict):
            raise ApiError(400, "response_format of type json_schema needs json_schema.schema", param="response_format")
        asked.append(StructuredOutputsParams(json=schema.schema_))
    if body.structured_outputs is not None:
        given = body.structured_outputs
        try:
            asked.append(
                StructuredOutputsParams(
                    json=given.json_,
                    regex=given.regex,
                    choice=given.choice,
                    grammar=given.grammar,
                    json_object=given.json_object,
                )
            )
        except ConfigError as error:
            raise ApiError(400, str(error), param="structured_outputs") from None
    if len(asked) > 1:
        raise ApiError(400, "response_format, structured_outputs and a required tool call exclude each other")
    return asked[0] if asked else None
