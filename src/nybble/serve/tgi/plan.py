"""From a body to what the engine is asked: the prompt, and how tokens are drawn, with TGI's defaults."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from nybble.core.errors import ConfigError
from nybble.core.sampling import RequestOutputKind, SamplingParams, StructuredOutputsParams
from nybble.serve.bodies import MAX_CHARS_PER_TOKEN, check_length
from nybble.serve.errors import ApiError
from nybble.serve.openai.job import Server
from nybble.serve.tgi.schemas import GenerateBody, Grammar, Parameters


@dataclass(frozen=True, slots=True)
class Plan:
    """A request, understood. seed: that of the first sample; None if nothing is drawn at random."""

    inputs: str
    prompt: list[int]
    params: SamplingParams
    seed: int | None
    with_details: bool
    with_full_text: bool
    with_prompt: bool
    num_top_tokens: int

    @property
    def text_before(self) -> str:
        """What stands before the text that is generated, where the whole text was asked for."""
        return self.inputs if self.with_full_text else ""


def make_plan(server: Server, body: GenerateBody, *, stream: bool) -> Plan:
    """What a body asks for. Takes a while: call it off the event loop.

    Raises:
        ApiError: 400 that names the parameter which cannot be used.
    """
    given = body.parameters or Parameters(do_sample=True)  # TGI draws at random where no parameters are given at all
    draws = _draws(given)
    _check(given, server, draws=draws, stream=stream)
    prompt = _prompt(server, body, given.truncate)
    context, longest = server.engine.context, given.max_new_tokens
    if len(prompt) + (longest or 1) > context:
        raise ApiError(
            400,
            f"inputs has {len(prompt)} tokens and max_new_tokens is {longest or 1}: together they must be at most "
            f"{context}",
            param="inputs" if longest is None else "max_new_tokens",
        )
    seed = None if not draws else secrets.randbits(63) if given.seed is None else given.seed
    best_of = given.best_of or 1
    wants_logprobs = stream or given.details is True or best_of > 1
    try:
        params = SamplingParams(
            n=best_of,
            temperature=(given.temperature or 1.0) if draws else 0.0,
            top_k=given.top_k or 0,
            top_p=given.top_p or 1.0,
            repetition_penalty=given.repetition_penalty or 1.0,
            frequency_penalty=given.frequency_penalty or 0.0,
            seed=seed,
            stop=given.stop,
            include_stop_str_in_output=True,  # as TGI does
            max_tokens=longest,
            logprobs=(given.top_n_tokens or 0) if wants_logprobs else None,
            prompt_logprobs=0 if given.decoder_input_details else None,
            structured_outputs=None if given.grammar is None else _structured(given.grammar),
            output_kind=RequestOutputKind.DELTA,
        )
    except ConfigError as error:
        raise ApiError(400, str(error)) from None
    return Plan(
        inputs=body.inputs,
        prompt=prompt,
        params=params,
        seed=seed,
        with_details=given.details is True,
        with_full_text=given.return_full_text is True,
        with_prompt=given.decoder_input_details is True,
        num_top_tokens=given.top_n_tokens or 0,
    )


def _draws(given: Parameters) -> bool:
    """Whether tokens are drawn at random: TGI is greedy unless something is said that only matters then."""
    warped = given.temperature not in (None, 1.0) or given.top_p not in (None, 1.0) or given.top_k is not None
    return given.do_sample is True or warped


def _check(given: Parameters, server: Server, *, draws: bool, stream: bool) -> None:
    settings = server.settings
    if given.typical_p not in (None, 1.0):
        raise ApiError(400, "typical_p is not supported: use top_p", param="typical_p")
    if given.watermark:
        raise ApiError(400, "watermark is not supported: leave it out", param="watermark")
    if len(given.stop or ()) > settings.max_stop_strings:
        raise ApiError(400, f"stop has more than {settings.max_stop_strings} texts", param="stop")
    if any(len(text) > settings.max_stop_chars for text in given.stop or ()):
        raise ApiError(400, f"a text of stop has more than {settings.max_stop_chars} characters", param="stop")
    if given.decoder_input_details and stream:
        raise ApiError(400, "decoder_input_details does not go with a stream", param="decoder_input_details")
    best_of = given.best_of or 1
    if best_of > settings.max_n:
        raise ApiError(400, f"best_of must be at most {settings.max_n}", param="best_of")
    if best_of > 1 and stream:
        raise ApiError(400, "best_of does not go with a stream", param="best_of")
    if best_of > 1 and not draws:
        raise ApiError(400, "best_of needs do_sample, or they would all be the same", param="best_of")
    if best_of > 1 and given.seed is not None:
        raise ApiError(400, "seed does not go with best_of: each sample has its own", param="seed")


def _prompt(server: Server, body: GenerateBody, truncate: int | None) -> list[int]:
    """The tokens of the inputs; of those that are to be truncated the last ones."""
    context, text = server.engine.context, body.inputs
    if not text:
        raise ApiError(400, "inputs must not be empty", param="inputs")
    if truncate is None:
        check_length(len(text), context, "inputs")
        return server.engine.tokenizer.encode(text, add_special=body.add_special_tokens)
    if truncate >= context:
        raise ApiError(400, f"truncate must be less than the context of {context} tokens", param="truncate")
    text = text[-context * MAX_CHARS_PER_TOKEN :]  # more than the tokens that are kept
    return server.engine.tokenizer.encode(text, add_special=body.add_special_tokens)[-truncate:]


def _structured(grammar: Grammar) -> StructuredOutputsParams:
    value = grammar.value
    if grammar.type == "regex":
        if not isinstance(value, str):
            raise ApiError(400, "the value of a grammar of type regex must be a string", param="grammar")
        return StructuredOutputsParams(regex=value)
    if grammar.type == "json_schema" and isinstance(value, dict) and "schema" in value:
        unknown = set(value) - {"name", "schema"}
        if unknown:
            raise ApiError(400, f"grammar.value.{min(unknown)} is not supported", param="grammar")
        value = value["schema"]
    return StructuredOutputsParams(json=_schema(value))


def _schema(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ApiError(400, "the value of the grammar is not JSON", param="grammar") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the value of the grammar must be a JSON schema, which is an object", param="grammar")
    return value
