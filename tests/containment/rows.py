"""Which tests answer which class of incident; R: reliability, S: security.

A value is what the class is, the tests of it as ``path::function``, and what is not tested here, if anything.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    about: str
    tests: tuple[str, ...]
    without: str = ""


_CONNECTION, _SECURITY = "server/test_connection.py", "server/test_security.py"
_FAULTS, _HOSTILE = "containment/test_faults.py", "containment/test_hostile.py"
_ROWS, _BESIDE = "containment/test_rows.py", "containment/test_beside.py"

ROWS: dict[str, Row] = {
    "R1": Row("a client leaves and its work goes on", (
        f"{_CONNECTION}::test_leaving_before_the_first_token", f"{_CONNECTION}::test_leaving_midway",
        f"{_CONNECTION}::test_leaving_while_tokenising_submits_nothing",
        f"{_CONNECTION}::test_leaving_a_real_server", f"{_CONNECTION}::test_a_crowd_that_leaves",
        "server/test_leaving.py::test_leaving_with_the_end_of_the_body",
        "server/test_responses.py::test_leaving_a_stream_aborts",
        "server/test_messages.py::test_leaving_a_stream_aborts",
        "engine/test_aborts.py::test_a_thousand_aborts",
        "e2e/test_disconnects.py::test_a_hundred_clients_killed_in_the_middle_leave_nothing",
    ), "the time it takes, which make aborts measures"),
    "R2": Row("the web layer does not see a client leave", (
        f"{_CONNECTION}::test_a_pipelined_request_does_not_hide_a_disconnect",
        "server/test_direct.py::test_a_client_that_leaves_is_noticed_in_silence",
    )),
    "R3": Row("KV blocks leak", (
        "core/test_scheduler_machine.py::TestSchedulerMachine",
        "core/test_pressure.py::test_the_books_balance",
        "core/test_pressure.py::test_a_leak_is_noticed_when_the_last_request_ends",
        "engine/test_aborts.py::test_a_thousand_aborts",
    )),
    "R4": Row("the engine dies and the server lives", (
        f"{_FAULTS}::test_one_request_fails_alone", f"{_FAULTS}::test_one_row_fails_alone",
        f"{_FAULTS}::test_a_dead_engine_ends_everything_at_once",
        "server/test_serve.py::test_a_dead_engine_tells_everybody_and_ends_the_process",
    )),
    "R5": Row("alive but hung", (
        "engine/test_watch.py::test_work_without_steps_is_a_stall",
        "engine/test_watch.py::test_a_busy_engine_never_stalls",
        "engine/test_watch.py::test_an_idle_engine_never_stalls",
        "engine/test_watch.py::test_a_step_that_does_not_come_back",
        "server/test_ops.py::test_health_over_the_engines_life",
    )),
    "R6": Row("requests that are stuck or lost", (
        "core/test_pressure.py::test_the_books_balance", "bench/test_soak.py::test_books_that_do_not_balance",
    ), "hours of traffic, which make soak and make flood send"),
    "R7": Row("a queue without bounds", (
        "engine/test_serving_policies.py::test_a_burst_on_a_bounded_queue",
        "engine/test_serving_policies.py::test_refusal_comes_before_tokenising",
        "server/test_serving_options.py::test_a_full_queue",
        "core/test_pressure.py::test_the_queue_is_bounded_in_prompt_tokens",
    ), "5,000 requests at once, which make policies measures"),
    "R8": Row("tokenising blocks the event loop", (
        f"{_HOSTILE}::test_a_text_that_cannot_fit_is_refused_untokenised",
        "engine/test_async_engine.py::test_a_long_text_is_tokenised_off_the_loop",
        f"{_BESIDE}::test_streams_beside_hostile_input_say_what_they_say_alone",
    ), "times, which make hostile measures"),
    "R9": Row("a chat template blocks the event loop", (
        f"{_HOSTILE}::test_a_template_that_never_ends",
        "tokenizer/test_chat.py::test_a_request_cannot_set_the_renderers_options",
    )),
    "R10": Row("a grammar's compilation blocks everybody", (
        "guided/test_compiler.py::test_hostile_guides_end_in_time",
        "guided/test_compiler.py::test_what_takes_too_long_is_refused_and_costs_only_itself",
        f"{_BESIDE}::test_streams_beside_hostile_input_say_what_they_say_alone",
    ), "times, which make hostile and make guided measure"),
    "R11": Row("grammars fill memory or disk", (
        "guided/test_compiler.py::test_the_cache_is_bounded_and_drops_what_was_used_longest_ago",
        "guided/test_compiler.py::test_refusals_are_remembered_within_the_same_bound",
    )),
    "R12": Row("memory grows", ("bench/test_soak.py::test_a_leak_is_seen",),
               "the traffic itself, which make soak and make flood send"),
    "R13": Row("a slow reader", (
        f"{_CONNECTION}::test_a_client_that_does_not_read_is_given_up",
        "server/test_direct.py::test_a_reader_that_never_reads_is_given_up",
        "engine/test_async_engine.py::test_a_slow_reader_gets_everything_in_fewer_pieces",
    )),
    "R14": Row("giant parameters", (
        f"{_HOSTILE}::test_giant_parameters", f"{_HOSTILE}::test_json_that_is_none_or_too_deep",
        "server/test_hostile_bodies.py::test_bodies_with_something_else_in_one_place",
        f"{_BESIDE}::test_streams_beside_hostile_input_say_what_they_say_alone",
    ), "times, which make hostile measures"),
    "R15": Row("log-probabilities of prompts fill memory", (
        "worker/test_prompt_logprobs.py::test_a_long_prompt_has_few_logits_at_once",
    )),
    "R16": Row("echo, max_tokens 0 and other corners", (
        "server/test_completions.py::test_corner_cases_never_fail_with_5xx",
        "server/test_completions.py::test_max_tokens_0_gives_the_prompt_back",
    )),
    "R17": Row("a full KV cache, preemption storms", (
        "engine/test_async_engine.py::test_many_requests_under_a_tiny_cache_give_what_they_give_alone",
        "engine/test_llm_engine.py::test_a_cache_too_small_for_a_group_ends_it_with_length_not_a_hang",
        "core/test_pressure.py::test_a_group_alone_that_outgrows_the_cache_makes_room_for_those_who_wait",
    )),
    "R18": Row("the host runs out of memory", (
        "config/test_memory.py::test_the_tightest_of_the_groups_decides",
    ), "a process under a real limit"),
    "R19": Row("logits that are no numbers", (
        f"{_FAULTS}::test_one_row_fails_alone",
        "sampling/test_failures.py::test_logits_that_are_no_distribution",
        "attention/test_decode.py::test_another_rows_nan_stays_there",
    )),
    "R20": Row("one request's content in another's answer", (
        "test_llm.py::test_policies_change_no_token",
        "test_llm.py::test_seeded_draws_do_not_depend_on_neighbours_or_preemption",
        "core/test_scheduler_machine.py::TestSchedulerMachine", "guided/test_generation.py::"
        "test_rows_are_bit_identical_alone_and_in_a_mixed_batch",
    ), "campaigns of hours"),
    "R21": Row("an id that a client chose ends others' requests", (
        f"{_ROWS}::test_r21_ids_of_clients_are_for_the_log_alone",
        "server/test_completions.py::test_the_engine_gets_ids_of_ours",
    )),
    "R22": Row("characters split over tokens", (
        "tokenizer/test_detokenizer.py::test_random_ids",
        "tokenizer/test_detokenizer.py::test_a_character_split_over_tokens_appears_when_complete",
        "tokenizer/test_stop.py::test_one_stop_string_ends_at_the_same_place_however_the_text_is_cut",
    )),
    "R23": Row("a call of a tool that is cut off", (
        "server/tools/test_chat_tools.py::test_r23_a_call_cut_by_max_tokens",
        "server/tools/test_readers.py::test_r23_cut_at_any_place",
    )),
    "S1": Row("a path that gets round the key", (
        f"{_SECURITY}::test_no_path_gets_round_the_key", f"{_SECURITY}::test_header_tricks",
    )),
    "S2": Row("routes that nobody protects", (f"{_SECURITY}::test_every_route_has_an_auth_decision",)),
    "S3": Row("keys that can be timed", (
        f"{_SECURITY}::test_keys_are_compared_as_digests", f"{_SECURITY}::test_nothing_private_is_logged",
        "server/test_serve.py::test_keys_are_not_printed",
    ), "statistics of times: digests are what is compared"),
    "S4": Row("pickles from a socket", (f"{_ROWS}::test_s4_nothing_is_unpickled_but_from_our_own_pipe",)),
    "S5": Row("weights that are code", (
        "model/test_loaders.py::test_pickle_that_runs_code_is_refused_and_not_run",
        "model/test_loaders.py::test_auto_prefers_safetensors",
    )),
    "S6": Row("code of a model's repository, and checks that -O removes", (
        "config/test_model_config.py::test_remote_code_names_the_flag",
        "tokenizer/test_loader.py::test_code_of_the_repository_names_the_flag",
        f"{_ROWS}::test_s6_no_check_is_an_assert",
    )),
    "S7": Row("templates that reach for Python", ("tokenizer/test_chat.py::test_failures_are_the_requests",)),
    "S8": Row("templates that never end", (f"{_HOSTILE}::test_a_template_that_never_ends",)),
    "S9": Row("grammars that kill", (
        "guided/test_compiler.py::test_hostile_guides_end_in_time",
        "guided/test_compiler.py::test_the_end_of_the_process_costs_only_its_guide",
        f"{_HOSTILE}::test_json_that_is_none_or_too_deep",
    )),
    "S10": Row("an error of a guide that kills the engine", (
        f"{_FAULTS}::test_a_grammar_fails_alone_and_is_asked_for_again",
        "guided/test_generation.py::test_a_matcher_that_fails_ends_its_own_request_only",
    )),
    "S11": Row("addresses of media", (f"{_ROWS}::test_s11_media_are_refused_and_nothing_is_fetched",)),
    "S12": Row("errors that tell secrets, media bombs", (
        f"{_FAULTS}::test_one_request_fails_alone", "server/test_errors.py::test_what_nobody_expected",
        f"{_ROWS}::test_s11_media_are_refused_and_nothing_is_fetched",
    )),
    "S13": Row("a poisoned prefix cache", (
        "core/test_prefix_cache.py::test_equal_keys_with_different_tokens_are_told_apart",
        "core/test_prefix_cache.py::test_keys_differ_between_processes",
    )),
    "S14": Row("a prefix cache that can be timed", (
        "engine/test_serving_policies.py::test_a_salt_keeps_strangers_out",
        "core/test_prefix_cache.py::test_salt_adapter_and_image_keep_prompts_apart",
    ), "statistics of times: the count of cached tokens is what is compared"),
    "S15": Row("giant heads", (f"{_HOSTILE}::test_heads",)),
    "S16": Row("giant bodies", (
        f"{_HOSTILE}::test_a_large_body_leaves_no_memory_behind", f"{_HOSTILE}::test_heads",
        "server/test_errors.py::test_too_large_a_body",
    )),
    "S17": Row("connections held open", (
        f"{_HOSTILE}::test_a_head_that_trickles_is_given_up", f"{_HOSTILE}::test_idle_connections_make_room",
    )),
    "S18": Row("one request read as two", (
        f"{_HOSTILE}::test_chunks_and_length_at_once_are_one_request", f"{_HOSTILE}::test_heads",
    )),
    "S19": Row("HTTP/2 resets", (f"{_CONNECTION}::test_only_http_1_is_spoken",),
               "HTTP/2 itself, which is not spoken"),
    "S20": Row("paths in names of adapters and models", (
        f"{_ROWS}::test_s20_names_of_models_are_no_paths",
        "config/test_cli.py::test_lora_modules_parse_and_are_refused",
    ), "adapters, which are not built yet"),
    "S21": Row("forged lines and secrets in the log", (
        "test_log.py::test_a_record_is_one_line_whatever_it_holds",
        "test_log.py::test_a_traceback_cannot_forge_a_record",
        "test_log.py::test_by_default_nothing_of_what_is_said_is_logged",
        f"{_ROWS}::test_r21_ids_of_clients_are_for_the_log_alone",
    )),
    "S22": Row("a browser's page that calls another's server", (
        f"{_SECURITY}::test_cors_by_default", f"{_SECURITY}::test_cors_restricted",
    ), "a list of allowed hosts, which there is not: a key protects"),
}  # fmt: skip
