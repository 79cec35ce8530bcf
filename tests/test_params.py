"""SamplingParams: what is accepted, what is refused, and what becomes of it."""

from __future__ import annotations

import inspect
import math
import pickle
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aserve.errors import InvalidRequestError
from aserve.messages.params import GuidedParams, SamplingParams, SamplingType

NAN, INF = float("nan"), float("inf")

ORDER = {
    "n": 1,
    "best_of": None,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "seed": None,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "stop": None,
    "stop_token_ids": None,
    "include_stop_str_in_output": False,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "logits_processors": None,
    "truncate_prompt_tokens": None,
}
BEAM = {"use_beam_search": True, "best_of": 2, "temperature": 0.0}


def refused(param: str, **options: Any) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**options)
    assert isinstance(caught.value, ValueError)
    assert caught.value.param == param
    return str(caught.value)


def test_order_and_defaults_of_the_constructor() -> None:
    parameters = inspect.signature(SamplingParams).parameters
    shown = {name: parameter.default for name, parameter in parameters.items()}
    assert list(shown.items())[: len(ORDER)] == list(ORDER.items())
    assert list(shown)[len(ORDER) :] == ["logit_bias", "guided"]
    params = SamplingParams(2, 3, 0.1, 0.2, 1.3)
    assert (params.n, params.best_of, params.presence_penalty) == (2, 3, 0.1)
    assert (params.frequency_penalty, params.repetition_penalty) == (0.2, 1.3)


def test_absent_values_are_filled_in() -> None:
    params = SamplingParams()
    assert (params.best_of, params.stop, params.stop_token_ids) == (1, [], [])
    assert SamplingParams(n=3).best_of == 3
    assert params.max_tokens == 16 and SamplingParams(max_tokens=None).max_tokens is None


# Values at the edges of each field's range.
TAKEN: dict[str, list[Any]] = {
    "n": [1, 100],
    "best_of": [1, 5, None],
    "presence_penalty": [-2, -2.0, 0, 2.0],
    "frequency_penalty": [-2.0, 2],
    "repetition_penalty": [1e-6, 1, 2.0],
    "temperature": [0, 0.0, 1e-6, 1e-5, 2, 1e300],
    "top_p": [1e-9, 0.5, 1],
    "top_k": [-1, 1, 10**9],
    "min_p": [0, 0.5, 1],
    "seed": [None, -1, 0, -5, 2**70],
    "stop": [None, "a", ["a", "bc"], ("a",), []],
    "stop_token_ids": [None, [], [0, 5], (1,)],
    "include_stop_str_in_output": [True, False],
    "ignore_eos": [True],
    "max_tokens": [1, None, 10**6],
    "min_tokens": [0, 16],
    "logprobs": [None, 0, 20],
    "prompt_logprobs": [None, 0, 20],
    "detokenize": [False],
    "skip_special_tokens": [False],
    "spaces_between_special_tokens": [False],
    "logits_processors": [None, [], [max, print]],
    "truncate_prompt_tokens": [None, 1, 10**6],
    "logit_bias": [None, {}, {0: 1}, {"7": -3.5}],
    "guided": [None, GuidedParams(json_object=True)],
    "early_stopping": [False],
    "length_penalty": [1, 1.0],
}

REFUSED: dict[str, list[Any]] = {
    "n": [0, -1, 1.0, "1", True, None],
    "best_of": [0, -1, 1.5, True],
    "presence_penalty": [-2.01, 2.01, NAN, INF, "0", None, True],
    "frequency_penalty": [-2.01, 2.01, NAN, -INF, None],
    "repetition_penalty": [0, -0.1, 2.01, NAN, None],
    "temperature": [-0.1, -1e-9, NAN, INF, -INF, 10**400, "1", None, False],
    "top_p": [0, -0.1, 1.01, NAN, None],
    "top_k": [0, -2, 1.0, NAN, None, True],
    "min_p": [-0.01, 1.01, NAN, None],
    "seed": [1.0, "1", True, NAN],
    "stop": ["", [""], ["a", ""], [1], [None], 5, {"a": 1}],
    "stop_token_ids": [["1"], [1.0], [True], 5, "12"],
    "include_stop_str_in_output": [1, None, "true"],
    "ignore_eos": [0, None],
    "use_beam_search": [1, None],
    "max_tokens": [0, -1, 1.0, True],
    "min_tokens": [-1, 17, 1.0, None, True],
    "logprobs": [-1, 1.0, True],
    "prompt_logprobs": [-1, 2.5, False],
    "detokenize": [1, None],
    "skip_special_tokens": [1],
    "spaces_between_special_tokens": [None],
    "logits_processors": [[5], max, "f"],
    "truncate_prompt_tokens": [0, -1, 1.0, True],
    "logit_bias": [
        [1],
        {"x": 1},
        {-1: 1},
        {1: NAN},
        {1: INF},
        {1: "2"},
        {1: None},
        {1.5: 1},
        {True: 1},
        {"²": 1},
    ],
    "guided": [{}, "json", True],
    "early_stopping": [True, "never", "x", None],
    "length_penalty": [0.9, 1.1, NAN, None],
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, values in TAKEN.items() for v in values])
def test_taken(name: str, value: Any) -> None:
    SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, values in REFUSED.items() for v in values])
def test_refused_with_the_name_of_the_field(name: str, value: Any) -> None:
    assert refused(name, **{name: value}).startswith(name)


def test_every_field_has_cases() -> None:
    names = {field.name for field in fields(SamplingParams)}
    assert names == set(REFUSED) == set(TAKEN) | {"use_beam_search"}


def test_messages_stay_short() -> None:
    assert len(refused("stop", stop=[1] * 10_000)) < 200
    assert len(refused("n", n=-(10**3000))) < 200
    assert len(refused("logit_bias", logit_bias={"9" * 5000: 1})) < 200


def test_fields_checked_against_each_other() -> None:
    refused("best_of", n=3, best_of=2)
    refused("min_tokens", min_tokens=5, max_tokens=4)
    SamplingParams(min_tokens=5, max_tokens=None)
    refused("stop", stop="a", detokenize=False)
    SamplingParams(stop=[], detokenize=False)


@pytest.mark.parametrize("temperature", [0, 0.0, 9e-6])
def test_greedy_resets_truncation(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.5, top_k=3, min_p=0.2, presence_penalty=1)
    assert (params.top_p, params.top_k, params.min_p) == (1.0, -1, 0.0)
    assert params.presence_penalty == 1.0 and params.sampling_type is SamplingType.GREEDY
    refused("top_k", temperature=temperature, top_k=0)


@pytest.mark.parametrize("width", [{"n": 2}, {"best_of": 2}])
def test_greedy_has_one_sequence(width: dict[str, int]) -> None:
    refused(*width, temperature=0, **width)
    SamplingParams(temperature=1e-5, **width)


def test_temperature_at_the_border_is_random() -> None:
    params = SamplingParams(temperature=1e-5, top_k=3)
    assert params.top_k == 3 and params.sampling_type is SamplingType.RANDOM


def test_beam_search_fields() -> None:
    for early_stopping in (True, False, "never"):
        params = SamplingParams(**BEAM, early_stopping=early_stopping, length_penalty=0.7)
        assert params.sampling_type is SamplingType.BEAM and params.best_of == 2
    assert SamplingParams(**{**BEAM, "seed": 5}).sampling_type is SamplingType.BEAM
    refused("best_of", **{**BEAM, "best_of": 1})
    refused("best_of", use_beam_search=True, temperature=0)
    refused("temperature", **{**BEAM, "temperature": 1e-5})
    refused("top_p", **BEAM, top_p=0.9)
    refused("top_k", **BEAM, top_k=5)
    refused("early_stopping", **BEAM, early_stopping="always")
    refused("early_stopping", **BEAM, early_stopping=1)
    refused("length_penalty", **BEAM, length_penalty=NAN)


def test_seed_minus_one_is_no_seed() -> None:
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(seed=-1).sampling_type is SamplingType.RANDOM
    assert SamplingParams(seed=0).sampling_type is SamplingType.RANDOM_SEED


def test_forms_of_stop() -> None:
    assert SamplingParams(stop="ab").stop == ["ab"]
    given_list = ["b", "a"]
    params = SamplingParams(stop=given_list)
    assert params.stop == ["b", "a"] and params.stop is not given_list
    assert SamplingParams(stop=("b", "a")).stop == ["b", "a"]
    ids = [5, 3]
    assert SamplingParams(stop_token_ids=ids).stop_token_ids == [5, 3]
    assert SamplingParams(stop_token_ids=ids).stop_token_ids is not ids


def test_logit_bias_is_keyed_by_int_and_clamped() -> None:
    params = SamplingParams(logit_bias={"12": 1, 5: -1e9, 6: 1e9})
    assert params.logit_bias == {12: 1.0, 5: -100.0, 6: 100.0}
    assert all(type(value) is float for value in params.logit_bias.values())


def test_integers_become_floats() -> None:
    params = SamplingParams(temperature=1, top_p=1, presence_penalty=2)
    for name in ("temperature", "top_p", "presence_penalty"):
        assert type(getattr(params, name)) is float


def test_attributes_may_change_later() -> None:
    params = SamplingParams(temperature=0.5)
    params.seed = 100
    assert params.sampling_type is SamplingType.RANDOM_SEED
    params.temperature = 0.0
    assert params.sampling_type is SamplingType.GREEDY
    params.detokenize = False
    assert params.clone().detokenize is False


class Uncopyable:
    def __call__(self, output_ids: list[int], row: Any) -> Any:
        return row

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot be copied")


def test_clone_shares_only_the_processors() -> None:
    processor = Uncopyable()
    params = SamplingParams(stop=["a"], stop_token_ids=[1], logits_processors=[processor], logit_bias={1: 2})
    clone = params.clone()
    assert clone == params and clone is not params
    assert clone.logits_processors == [processor] and clone.logits_processors is not params.logits_processors
    for name in ("stop", "stop_token_ids", "logit_bias"):
        assert getattr(clone, name) == getattr(params, name)
        assert getattr(clone, name) is not getattr(params, name)


def test_repr_shows_all_but_two_fields() -> None:
    text = repr(SamplingParams(n=2, stop="x", logits_processors=[max]))
    assert text.startswith("SamplingParams(n=2, best_of=2, ") and "stop=['x']" in text
    for field in fields(SamplingParams):
        hidden = field.name in ("detokenize", "logits_processors")
        assert (f" {field.name}=" in text.replace("(", " ")) is not hidden, field.name


def test_survives_pickling() -> None:
    params = SamplingParams(n=2, stop=["a"], logit_bias={1: 2.0}, seed=3)
    assert pickle.loads(pickle.dumps(params)) == params


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.floats(),
    st.text(max_size=2),
    st.lists(st.one_of(st.integers(-1, 3), st.text(max_size=1)), max_size=3),
    st.dictionaries(st.one_of(st.integers(-1, 3), st.text(max_size=1)), st.floats(), max_size=2),
)


@given(st.dictionaries(st.sampled_from([*ORDER, "logit_bias"]), ANYTHING, max_size=6))
def test_any_input_is_either_valid_or_refused(options: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**options)
    except InvalidRequestError as error:
        assert error.param in options or error.param == "best_of"
        return
    assert params.n >= 1 and params.best_of is not None and params.best_of >= params.n
    assert params.temperature >= 0 and math.isfinite(params.temperature)
    assert 0 < params.top_p <= 1 and (params.top_k == -1 or params.top_k >= 1) and 0 <= params.min_p <= 1
    assert params.clone() == params
