"""The bodies clients send, as far as their types go; meaning is checked where it is used.

Unknown fields are ignored and named once in the log, or refused with ``--strict-fields``. A field of type
``Any`` that is not read anywhere is one that clients send and that has no effect here; the README lists
them. ``null`` means "not given" wherever a field is optional. Integers are accepted for floats and whole
floats for integers; strings and booleans are not numbers. NaN and infinities are refused.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from quart import request
from werkzeug.exceptions import UnsupportedMediaType

from aserve.errors import InvalidRequestError
from aserve.messages.inputs import RequestOptions
from aserve.messages.params import GuidedParams, SamplingParams
from aserve.server.bodies import is_large
from aserve.server.body_child import parse
from aserve.server.openai.guided import guided_params
from aserve.server.service import service
from aserve.server.survey import Limits

MAX_PROMPTS = 2048
"""Most prompts in one call."""

MAX_CHOICES = 4096
MAX_TOOLS = 512
MAX_STOP = 16
MAX_STOP_LENGTH = 4096
MAX_STOP_TOKENS = 256
MAX_BIAS = 1024
MAX_ID_DIGITS = 20
MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_DOCUMENTS = 256
MAX_TEMPLATE_VARIABLES = 64
MAX_SHOWN_ERRORS = 5


def _number(value: Any) -> Any:
    if isinstance(value, (bool, str, bytes)):
        raise ValueError("must be a number")
    return value


Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number)]
Bool = Annotated[bool, Strict()]
StopString = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
# Bounds come first: after a validator of ours, pydantic's JSON schema has no "minimum" for them but "ge".
Count = Annotated[int, Field(ge=0), BeforeValidator(_number)]
PositiveInt = Annotated[int, Field(ge=1), BeforeValidator(_number)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), BeforeValidator(_number)]


class Body(BaseModel):
    """Base of every request body."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())

    most: ClassVar[dict[str, int]] = {}
    """Items of fields whose type does not tell."""
    ids: ClassVar[str | None] = None
    """The field that may be token ids or lists of them; those of a large body come as arrays."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {key: value for key, value in values.items() if value is not None}
        return values


class StreamOptions(Body):
    include_usage: Bool = False
    continuous_usage_stats: Bool = False
    include_obfuscation: Any = None


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: Bool | None = None


class ResponseFormat(Body):
    type: str
    json_schema: JsonSchema | None = None


class SamplingBody(Body):
    """Fields that completions and chat share."""

    most = {"guided_choice": MAX_CHOICES}

    model: str
    max_tokens: Int | None = None
    n: Int = 1
    best_of: Int | None = None
    presence_penalty: Float = 0.0
    frequency_penalty: Float = 0.0
    repetition_penalty: Float = 1.0
    temperature: Float = 1.0
    top_p: Float = 1.0
    top_k: Int = -1
    min_p: Float = 0.0
    seed: Seed | None = None
    use_beam_search: Bool = False
    length_penalty: Float = 1.0
    early_stopping: Bool = False
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP)] | None = None
    stop_token_ids: Annotated[list[Int], Field(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: Bool = False
    ignore_eos: Bool = False
    min_tokens: Int = 0
    skip_special_tokens: Bool = True
    spaces_between_special_tokens: Bool = True
    truncate_prompt_tokens: PositiveInt | None = None
    logit_bias: Annotated[dict[str, Float], Field(max_length=MAX_BIAS)] | None = None
    stream: Bool = False
    stream_options: StreamOptions | None = None
    echo: Bool = False
    user: Any = None
    response_format: ResponseFormat | None = None
    priority: Int = 0
    timeout: Float | None = None
    cache_salt: str | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: str | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return (
            self.include_usage
            and self.stream_options is not None
            and (self.stream_options.continuous_usage_stats)
        )

    def check(self, *, vocab_size: int, max_num_seqs: int) -> None:
        """Raises InvalidRequestError for what needs the engine's limits, and for what is not built."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options needs stream to be true", param="stream_options")
        for name in ("n", "best_of"):
            value = getattr(self, name)
            if value is not None and value > max_num_seqs:
                raise InvalidRequestError(
                    f"{name} must be at most {max_num_seqs} (max_num_seqs), got {_short(value)}", param=name
                )
        check_token_ids(self.stop_token_ids or [], vocab_size, "stop_token_ids")
        if self.logit_bias:
            check_token_ids(self._bias_ids(), vocab_size, "logit_bias")
        _ = self.guide  # which may be refused

    def options(self) -> RequestOptions:
        return RequestOptions(self.priority, self.timeout, self.cache_salt)

    def sampling_params(self, **values: Any) -> SamplingParams:
        """Parameters for the engine; ``values`` are the fields the endpoint works out itself."""
        names = (
            "n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature",
            "top_p", "top_k", "min_p", "seed", "use_beam_search", "length_penalty", "early_stopping", "stop",
            "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens",
            "spaces_between_special_tokens", "logit_bias",
        )  # fmt: skip
        values.setdefault("guided", self.guide)
        return SamplingParams(**{name: getattr(self, name) for name in names}, **values)

    @cached_property
    def guide(self) -> GuidedParams | None:
        """What the output must look like; raises InvalidRequestError if that is asked for twice.

        Made once and not for every prompt: a schema has to be turned into text.
        """
        return guided_params(self)

    def _bias_ids(self) -> list[int]:
        keys = list(self.logit_bias or ())
        if not all(key.isascii() and key.isdigit() and len(key) <= MAX_ID_DIGITS for key in keys):
            raise InvalidRequestError("logit_bias must be keyed by token ids", param="logit_bias")
        return [int(key) for key in keys]


class CompletionBody(SamplingBody):
    most = {**SamplingBody.most, "prompt": MAX_PROMPTS}
    ids = "prompt"

    prompt: Any
    max_tokens: Int | None = 16
    logprobs: Count | None = None
    suffix: Any = None
    add_special_tokens: Bool = True


class Message(Body):
    role: str
    content: str | Annotated[list[dict[str, Any]], Field(max_length=MAX_PARTS)] | None = None
    name: str | None = None
    tool_calls: Any = None
    tool_call_id: str | None = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
TemplateVariables = Annotated[dict[str, Any], Field(max_length=MAX_TEMPLATE_VARIABLES)]


class ChatBody(SamplingBody):
    most = {**SamplingBody.most, "tools": MAX_TOOLS}

    messages: Messages
    temperature: Float = 0.7
    max_completion_tokens: Int | None = None
    logprobs: Bool = False
    top_logprobs: Count | None = None
    add_generation_prompt: Bool = True
    continue_final_message: Bool = False
    add_special_tokens: Bool = False
    chat_template_kwargs: TemplateVariables | None = None
    documents: Annotated[list[dict[str, Any]], Field(max_length=MAX_DOCUMENTS)] | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None
    modalities: Annotated[list[str], Field(max_length=8)] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: Bool | None = None
    # Asked for by some clients, and not to be had here.
    chat_template: Any = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None
    moderation: Any = None
    # Without effect.
    audio: Any = None
    metadata: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    verbosity: Any = None

    def check(self, *, vocab_size: int, max_num_seqs: int) -> None:
        super().check(vocab_size=vocab_size, max_num_seqs=max_num_seqs)
        if set(self.modalities or ()) - {"text"}:
            raise InvalidRequestError('modalities may name "text" only', param="modalities")
        for name, instead in _REFUSED.items():
            if getattr(self, name):
                raise InvalidRequestError(f"{name} is not supported{instead}", param=name)

    def template_variables(self) -> dict[str, Any]:
        """Variables for the chat template besides the conversation; those that were named win.

        ``reasoning_effort`` goes under its own name, and "none" also as what templates with a switch for
        thinking look at.
        """
        found: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            found["reasoning_effort"] = self.reasoning_effort
            if self.reasoning_effort == "none":
                found["enable_thinking"] = False
        return {**found, **(self.chat_template_kwargs or {})}


_REFUSED = {
    "chat_template": ": start the server with --chat-template",
    "functions": ": use tools",
    "web_search_options": ": this server searches nothing",
    "moderation": ": this server moderates nothing",
}


Parsed = TypeVar("Parsed", bound=Body)


async def read(kind: type[Parsed]) -> Parsed:
    """Reads the present request's body as ``kind``, whatever its content type says.

    Raises InvalidRequestError for a body that is no JSON object or does not fit.
    """
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType
    data = request.body.whole()  # type: ignore[attr-defined]
    if data is None or is_large(data):
        values = await _read_large(limits_of(kind))
    else:
        values = parse(data)
    try:
        body = kind.model_validate(values)
    except ValidationError as error:
        raise describe(error) from None
    unknown = unknown_fields(kind, values)
    if unknown:
        if service().args.strict_fields:
            first = min(unknown)[:64]
            raise InvalidRequestError(
                f"{first}: there is no such field, and --strict-fields is set [extra_forbidden]", param=first
            )
        service().note_unknown_fields(unknown)
    return body


async def _read_large(limits: Limits) -> dict[str, Any]:
    """The fields of a body that is not there yet, or not to be parsed in the event loop."""
    survey = service().survey(limits)
    request.body.watch(survey)  # type: ignore[attr-defined]
    data: bytes = await request.get_data()  # type: ignore[assignment]
    survey.finish()
    return await service().bodies.read(data, limits) if is_large(data) else parse(data)


@cache
def limits_of(kind: type[Body]) -> Limits:
    """What a body of this kind may hold, as its fields' types say."""
    found = {name: _most_items(field) for name, field in _fields_of(kind).items()}
    return Limits({**{name: most for name, most in found.items() if most is not None}, **kind.most}, kind.ids)


def _most_items(field: FieldInfo) -> int | None:
    """The ``max_length`` of a field that is, or may be, an array or an object."""
    kinds = [(field.annotation, field.metadata)]
    kinds += [(each.__origin__, each.__metadata__) for each in get_args(field.annotation) if _marked(each)]
    for kind, marks in kinds:
        if get_origin(kind) in (list, dict):
            inner = [each for mark in marks if isinstance(mark, FieldInfo) for each in mark.metadata]
            for mark in (*marks, *inner):
                if (most := getattr(mark, "max_length", None)) is not None:
                    return int(most)
    return None


def _marked(annotation: Any) -> bool:
    return get_origin(annotation) is Annotated


def unknown_fields(kind: type[Body], values: dict[str, Any]) -> set[str]:
    """Names in ``values`` that ``kind`` does not know; those of a field's own fields are dotted.

    Objects in lists are not looked at: what a message holds is between the client and the chat template.
    """
    fields = _fields_of(kind)
    found = set(values.keys() - fields.keys())
    for name, value in values.items():
        if isinstance(value, dict) and name not in found:
            inner = _body_in(fields[name].annotation)
            if inner is not None:
                found |= {f"{name}.{each}" for each in unknown_fields(inner, value)}
    return found


@cache
def _fields_of(kind: type[Body]) -> dict[str, FieldInfo]:
    """The fields of a kind of body, as clients spell them."""
    return {field.alias or name: field for name, field in kind.model_fields.items()}


def _body_in(annotation: Any) -> type[Body] | None:
    for each in (annotation, *get_args(annotation)):
        if isinstance(each, type) and issubclass(each, Body):
            return each
    return None


def describe(error: ValidationError) -> InvalidRequestError:
    """One sentence per misfit, with its place and kind but never the value that was sent."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    shown = []
    for problem in problems[:MAX_SHOWN_ERRORS]:
        place = ".".join(str(part)[:64] for part in problem["loc"])
        shown.append(f"{place or 'body'}: {problem['msg']} [{problem['type']}]")
    if len(problems) > MAX_SHOWN_ERRORS:
        shown.append(f"and {len(problems) - MAX_SHOWN_ERRORS} more")
    field = problems[0]["loc"][:1]
    return InvalidRequestError("; ".join(shown), param=str(field[0])[:64] if field else None)


def check_token_ids(ids: list[int], vocab_size: int, param: str) -> None:
    """Raises InvalidRequestError unless every id is in the vocabulary."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise InvalidRequestError(
            f"{param}: token id {_short(wrong)} is not in the vocabulary of {vocab_size}", param=param
        )


def _short(value: int) -> str:
    # str() of a huge integer is slow and may be refused by the interpreter.
    return str(value) if -(2**70) < value < 2**70 else "an integer beyond 70 bits"
