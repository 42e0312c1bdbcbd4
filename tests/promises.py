"""Which tests hold which promise, and on which backends each of them runs: from here comes docs/promises.md.

A tick is never claimed by hand. Tests are named here; on which backends they run is what pytest collects.

```
python -m tests.promises --write
```
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

__all__ = ["BACKENDS", "PAGE", "PROMISES", "Held", "Promise", "collected", "held_by", "page"]

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "promises.md"
BACKENDS = {"sqlite": "SQLite", "postgresql": "PostgreSQL", "nats": "NATS"}
EVERYWHERE = "before all"
"""What stands before every backend, and is the same code whichever it is."""

_LOG = "test_conformance::test_each_backend_keeps_the_promise_that[*-{}]"
_SERVERS = {
    "postgresql": ("test_postgres*", "test_store_faults::*"),
    "nats": ("test_nats*",),
    EVERYWHERE: ("test_messages::*", "test_one_verdict::*", "test_hostile_keys::*", "test_cli_schema::*"),
}
"""Tests without a backend among their parameters: where they run is told by their module, else it is SQLite."""


class Promise(NamedTuple):
    """A number and a name as in the README, what it says, who holds it, and what is missing, by backend or for all."""

    name: str
    says: str
    tests: Sequence[str]
    missing: Mapping[str, str] = {}


class Held(NamedTuple):
    """A test by module and name, and where it runs."""

    test: str
    on: frozenset[str]


def log(*sentences: str) -> list[str]:
    """Promises of the log seam."""
    return [_LOG.format(each) for each in sentences]


PROMISES: tuple[Promise, ...] = (
    Promise(
        "Acknowledged is durable",
        "When `append`, `send` or `call` returns, the entry survives kill -9 and power loss at that instant.",
        [
            *log("what is acknowledged is read at once through every handle"),
            "test_crash::test_what_was_acknowledged_stands_once_after_a_hundred_rounds_of_kill_9",
            "test_postgres::test_an_immediate_restart_under_load_loses_nothing_acknowledged",
            "test_nats_cluster::test_what_was_acknowledged_stands_once_when_the_leader_is*",
            "test_nats_store::test_nothing_acknowledged_is_lost_when_the_server_is_killed_under_load",
            "test_calls::test_a_kill_between_the_fact_and_its_record_loses_neither",
            "test_calls::test_a_call_whose_time_is_over_tells_the_id_by_which_the_first_acceptance_is_learnt",
            "test_loans::test_a_log_that_is_fed_by_a_process_that_is_killed_twice_is_there_once",
        ],
        {
            "nats": "Only where the server has `sync_interval: always`; else the last moments before a power loss are "
            "lost. `cauce doctor` and a warning at the start say so.",
            "": "No test cuts the power: what is killed are processes, with the operating system alive.",
        },
    ),
    Promise(
        "All or nothing, one order",
        "Each append is written whole or not at all. A log has one order, the same for every reader, for ever; versions of a "
        "stream have no gaps.",
        [
            *log(
                "an append is all or nothing",
                "versions of a stream count without holes",
                "there is one order the same for every reader",
                "nothing appears below a place already read",
                "appends through two handles interleave without loss",
                "repeats on the way at once are written once",
                "what an append also writes stands with it or not at all",
                "of many that also expect one version one wins",
            ),
            "test_log_model::*",
            "test_postgres::test_no_reader_sees_a_position_appear_below_one_it_passed",
            "test_nats_chain::test_what_another_writes_while_ends_are_looked_up_comes_before_or_is_refused_and_leaves_no_version_twice",
            "test_nats_chain::test_many_on_one_stream_whose_answer_comes_late_stand_once_and_are_found_in_few_questions",
            "test_calls::test_200_concurrent_calls_on_one_thing_end_consistent_and_without_a_gap",
            "test_unique::test_two_instances_give_one_e_mail_once_and_a_third_when_one_is_killed",
            "test_unique::test_just_so_many_get_a_seat_whichever_instance_decides",
            "test_unique::test_a_gift_card_of_100_is_redeemed_10_times_by_10_whoever_asks",
        ],
    ),
    Promise(
        "One writer per domain",
        "Only the owner records a domain's events; another service gets `NotOwner` before anything is written. Of two instances "
        "of the owner the stale one is fenced and cannot write.",
        [
            *log(
                "a stale fence writes nothing",
                "a fence rises with every holder",
                "after the first entry of a new holder none of the old one follows",
            ),
            "test_services::test_a_domain_that_another_service_owns_is_refused_before_anything_is_written",
            "test_services::test_who_lost_a_slot_to_another_cannot_write_there",
            "test_instances::test_a_stopped_instance_loses_its_slots_writes_nothing_when_it_wakes_up_and_joins_again",
            "test_instances::test_an_owner_in_two_processes_decides_each_thing_in_one_and_calls_find_it",
            "test_store_promises::test_who_was_struck_off_cannot_store_anything",
            "test_owner::test_an_owner_that_was_stopped_writes_nothing_stale_when_it_wakes_up_and_decides_again_when_it_has_joined",
            "test_owner::test_an_owner_that_is_cut_off_from_the_bus_is_replaced_and_decides_again_when_it_is_back",
            "test_owner::test_an_owner_that_was_killed_is_started_again_and_goes_on_with_what_was_sent_meanwhile",
            "test_owner::test_two_versions_of_an_owner_run_side_by_side_while_the_newer_is_deployed",
            "test_owner::test_an_older_version_of_an_owner_decides_nothing_upon_facts_that_it_does_not_know",
            "test_owner::test_another_service_neither_starts_with_the_domain_nor_records_its_facts_while_the_owner_is_down",
        ],
    ),
    Promise(
        "Per-thing order, parallel across things",
        "A failing thing delays only itself.",
        [
            "test_reactions::test_later_messages_of_a_failing_thing_wait_behind_it_in_order_while_all_other_things_go_on",
            "test_reactions::test_a_failing_reaction_holds_up_no_other_reaction_to_the_same_message",
            "test_fold::test_a_thing_that_began_with_what_adds_to_nothing_is_named_to_whoever_asks_and_no_other_suffers",
            "test_reactions::test_an_event_that_takes_long_to_be_recorded_holds_up_no_other_thing_and_keeps_its_order",
            "test_instances::test_instances_share_slots_evenly_and_keep_the_order_of_each_thing_through_every_hand_over",
            "test_instances::test_a_thing_that_hangs_while_a_service_catches_up_delays_only_its_slot",
            "test_instances::test_too_many_behind_a_dead_letter_stop_its_slot_only",
            "test_poison::*",
            "test_concurrency::test_each_thing_keeps_its_order_and_each_effect_is_stored_once",
            "test_concurrency::test_what_fails_ahead_of_the_place_waits_with_the_later_ones_of_its_thing_and_no_other_does",
            "test_churn::test_instances_that_join_and_leave_all_the_time_lose_nothing_and_do_not_stop_the_others",
            "test_calls::test_what_is_sent_while_its_owner_is_away_is_decided_in_order_when_it_is_back",
        ],
        {"": "Calls that one caller makes at once, without awaiting the first, may be decided in any order."},
    ),
    Promise(
        "Effects in our stores once, outside at least once",
        "What a handler stores, says and has read is one unit, done once. What it does elsewhere may happen again after a crash, "
        "with the same `ctx.idempotency_key`.",
        [
            "test_instances::test_what_a_reaction_stores_says_and_its_place_are_one",
            "test_instances::test_what_was_said_is_said_once_wherever_the_process_dies",
            "test_reactions::test_what_a_reaction_returns_is_sent_once_though_it_is_handled_twice",
            "test_reactions::test_what_a_reaction_calls_or_sends_itself_is_done_once_though_it_is_handled_twice",
            "test_reactions::test_an_event_of_the_own_domain_that_a_reaction_returns_is_recorded_once_with_its_cause",
            "test_reactions::test_after_a_kill_messages_are_handled_again_with_the_same_key_and_none_is_skipped",
            "test_history::test_services_that_are_killed_at_random_lose_nothing_and_do_nothing_twice",
            "test_kills::*",
            "test_concurrency::test_what_was_handled_ahead_of_the_place_is_not_stored_twice_when_another_takes_over",
            "test_churn::test_a_rolling_restart_under_load_loses_nothing_and_no_caller_notices",
            "test_clock_set::test_a_clock_that_is_set_two_hours_forward_and_back_takes_no_lease_and_doubles_and_delays_nothing",
            "test_standing_still::test_instances_that_are_stopped_and_go_on_again_and_again_under_load_lose_nothing_and_do_nothing_twice",
            "test_store_faults::test_a_server_that_crashes_under_load_and_comes_back_lost_nothing_and_doubled_nothing",
            "test_calls::test_what_was_sent_is_decided_once_though_it_is_read_again_after_a_crash",
            "test_timers::test_a_message_for_later_is_sent_once_when_its_time_has_come_because_of_what_set_it",
            "test_timers::test_of_processes_that_are_killed_at_any_moment_each_timer_comes_once",
            "test_store_promises::test_of_two_who_let_go_at_once_each_timer_is_let_go_by_one",
        ],
        {
            "nats": "Tables of a service lie in files of its machine or in PostgreSQL, since a bucket has none.",
            "": "Whole systems that are killed at random for a while are tried on SQLite only.",
        },
    ),
    Promise(
        "A replay runs `evolve` and `view` only",
        "No command, no reaction, no mail.",
        [
            "test_reactions::test_a_restart_runs_evolve_only",
            "test_loans::test_a_rebuild_that_is_killed_changes_no_figure_and_the_next_one_ends_it",
            "test_calls::test_wishes_in_vain_are_kept_with_their_verdict_and_run_never_again",
            "test_calls::test_what_was_rejected_when_it_was_sent_is_not_granted_when_it_is_read_again",
        ],
    ),
    Promise(
        "Nothing is dropped in silence",
        "Retries with growing, jittered delay and a count that is kept; then a dead letter with cause, traceback and message, the "
        "later ones of the same thing waiting behind it in order.",
        [
            "test_reactions::test_a_failing_message_is_tried_again_with_growing_jittered_delay_until_it_is_handled",
            "test_reactions::test_a_failing_message_is_tried_again_later_each_time_until_it_is_handled",
            "test_reactions::test_the_count_of_attempts_survives_a_restart_and_so_does_the_order",
            "test_reactions::test_what_is_nobodys_fault_but_the_moments_never_counts_as_an_attempt",
            "test_instances::test_what_failed_too_often_is_a_dead_letter_and_a_person_decides",
            "test_instances::test_a_dead_letter_waits_through_a_restart_with_those_behind_it",
            "test_instances::test_a_message_that_kills_the_process_is_parked_and_no_other",
            "test_standing_still::test_a_message_that_ends_the_process_is_parked_after_three_of_them",
            "test_store_promises::test_dead_letters_of_all_services_are_listed_and_decided",
            "test_store_promises::test_a_dead_letter_is_edited_if_it_is_as_it_was_seen_and_nothing_else_of_it_changes",
            "test_store_promises::test_of_many_who_decide_about_a_dead_letter_at_once_one_does",
            "test_failure::test_one_poison_among_a_hundred_delays_only_its_own_thing",
            "test_poison::*",
            "test_clock_set::test_what_waits_to_be_tried_again_is_tried_soon_after_a_restart_whatever_the_clock_says",
            "test_clock_set::test_what_expires_does_so_by_the_clock_of_who_decides_and_a_verdict_stands_when_it_is_set_back",
            "test_failure::test_five_hundred_that_fail_together_do_not_come_back_together",
            "test_failure::test_while_a_callee_is_down_for_ten_minutes_nothing_is_parked_and_then_all_is_handled_in_order",
            "test_failure::test_what_is_not_the_messages_fault_waits_with_growing_delay_and_never_parks",
            "test_failure::test_an_event_that_its_log_refuses_for_good_is_a_dead_letter_with_the_later_ones_behind_it",
            "test_failure::test_a_mended_body_is_given_to_the_handler_and_log_and_original_stay_as_they_were",
            "test_failure::test_a_message_that_cannot_be_decoded_is_a_dead_letter_with_its_raw_bytes_that_can_be_mended",
            "test_failure::test_a_bulk_retry_by_two_terminals_at_once_drains_each_thing_once_and_in_order_over_two_instances",
            "test_failure::test_while_the_store_takes_no_dead_letter_its_lane_waits_and_says_so_and_then_goes_on",
        ],
    ),
    Promise(
        "A blocked service hurts nobody else",
        "Every call has a deadline that travels and shrinks; every callee has a breaker and a bulkhead. Work of an instance that hangs "
        "goes to another. A handler that blocks the loop or outlives its patience is reported with its stack.",
        [
            "test_standing_still::test_a_handler_that_blocks_its_loop_is_parked_after_three_times_and_all_instances_come_back",
            "test_standing_still::test_a_handler_that_never_gives_the_loop_back_is_shown_as_blocked_and_parked_when_three_were_replaced",
            "test_standing_still::test_a_handler_that_outlives_its_patience_is_cancelled_and_counts_as_failed_while_others_go_on",
            "test_standing_still::test_a_plain_handler_that_outlives_its_patience_is_left_to_its_thread_and_nothing_of_its_thing_begins_there",
            "test_guards::test_a_frozen_callee_is_soon_left_alone_and_asked_again_when_it_is_well",
            "test_guards::test_of_many_who_ask_when_the_rest_is_over_one_is_let_through_in_each_process",
            "test_guards::test_a_callee_that_flaps_is_left_alone_again_and_again_and_asked_soon_after_it_has_settled",
            "test_guards::test_a_reaction_waits_ten_minutes_for_a_callee_that_is_blocked_and_nothing_is_parked",
            "test_guards::test_more_questions_than_may_be_under_way_are_turned_away_at_once_and_nothing_ran",
            "test_guards::test_an_answer_function_has_so_many_in_hand_and_no_more_and_the_others_answer_on",
            "test_guards::test_a_fallback_answers_where_the_callee_cannot_be_asked_and_only_there",
            "test_guards::test_what_is_asked_because_of_a_question_gets_less_time_than_is_left_of_it",
            "test_guards::test_a_thousand_callers_of_a_healthy_system_meet_no_guard",
            "test_guards_apart::*",
            "test_backlog::test_a_backlog_of_200_000_*",
            "test_freshness::test_nothing_is_begun_on_a_lease_past_two_thirds_of_its_time",
            "test_draining::test_a_process_ends_within_its_drain_whatever_its_handlers_do",
            "test_draining::test_what_is_handed_back_is_taken_by_another_instance_at_once",
            "test_locator::test_who_dies_between_the_work_and_the_reply_leaves_a_call_unknown_and_its_id_gives_the_receipt",
            "test_locator::test_a_query_whose_process_dies_before_the_reply_is_answered_by_another_instance",
            "test_locator::test_while_*_the_last_known_list_serves_marked_stale*",
            "test_clock_set::test_a_question_that_*",
            "test_clock_set::test_who_is_well_and_who_stands_still_is_told_whatever_the_clock_says",
            "test_blocked::test_the_example_of_a_stopped_service_shows_breaker_fallback_steady_others_and_recovery",
            "test_wire_promises::test_a_deadline_travels_and_cancels_what_it_was_for",
            "test_wire_promises::test_one_that_stands_still_is_a_timeout_and_when_it_goes_on_begins_nothing_that_is_over",
            "test_wire_promises::test_of_three_of_which_one_stands_still_all_questions_that_change_nothing_are_answered",
            "test_calls::test_an_answer_that_never_comes_is_no_answer_when_the_time_is_over",
            "test_calls::test_nobody_who_serves_is_no_answer_at_once_and_nothing_is_stored",
            "test_instances::test_a_stopped_instance_loses_its_slots_writes_nothing_when_it_wakes_up_and_joins_again",
            "test_reactions::test_a_plain_reaction_may_block_without_holding_up_the_others",
            "test_services::test_a_handler_that_is_too_slow_is_handed_back_and_handled_again_after_the_next_start",
        ],
    ),
    Promise(
        "A copy never goes back",
        "Replicas apply by version. A late joiner becomes complete, to the last written record, while the owner is down.",
        [
            *log(
                "put keeps the last of each stream and moves it to the end", "a reader misses nothing while puts move"
            ),
            "test_replicas::test_a_late_joiner_becomes_complete_while_the_owner_is_down",
            "test_replicas::test_the_cards_of_the_shop_are_issued_while_users_is_down",
            "test_replicas::test_what_is_deleted_or_becomes_another_record_is_not_there_until_it_is_again",
            "test_replicas::test_whatever_the_order_and_however_often_the_newest_version_stands",
            "test_shelf::test_an_older_record_does_not_bring_a_copy_back",
            "test_views::test_one_sees_ones_own_write_many_times_in_a_row",
        ],
        {"nats": "Views and replicas lie in files of the service's machine or in PostgreSQL, not on NATS."},
    ),
    Promise(
        "Old events are readable",
        "Stored bytes never change; upcasters bring an event of years ago to today's type; a schema lock lets a change that is not "
        "compatible fail in CI; what is newer than the code, or unknown to it, waits and is named.",
        [
            *log("envelope and body come back byte for byte"),
            "test_upcast::test_today_s_code_reads_what_the_first_one_wrote",
            "test_upcast::test_what_a_broken_upcaster_cannot_lift_is_parked_and_read_after_it_was_mended",
            "test_past::test_facts_of_an_import_have_no_wish_and_those_of_today_s_names_are_told_by_them",
            "test_upcast::test_a_thing_that_cannot_be_lifted_is_named_to_whoever_asks_and_no_other_suffers",
            "test_cli_schema::test_the_library_reads_what_version_1_of_it_wrote",
            "test_cli_schema::test_removing_a_used_field_of_the_library_fails_its_check_naming_its_readers",
            "test_reactions::test_a_fact_of_a_newer_schema_or_an_unknown_shape_waits_and_is_named",
        ],
    ),
    Promise(
        "Damage is found, not read",
        "Every entry carries a digest, checked before a fold or a handler sees it; `cauce verify` walks all of them; a consumer "
        "ahead of its log, or in another log, stops loudly.",
        [
            "test_reactions::test_a_place_beyond_the_end_of_its_log_stops_the_start",
            "test_reactions::test_a_place_in_another_log_stops_the_start",
            "test_store_promises::test_a_place_in_another_log_or_beyond_its_end_is_damage_that_names_the_cure",
            "test_reactions::test_a_damaged_entry_stops_its_reader_loudly_and_no_handler_sees_it",
            "test_verify::test_a_thousand_flipped_bits_never_pass_for_an_untouched_log",
            "test_verify_everywhere::test_a_body_that_is_not_what_was_written_is_named",
            "test_verify_everywhere::test_a_fact_that_is_gone_from_the_middle_is_named_by_its_position_and_its_stream",
            "test_verify_everywhere::test_facts_that_are_gone_at_the_end_are_missed",
            "test_verify_everywhere::test_beside_who_writes_and_who_forgets_nothing_is_found",
            "test_reset::test_after_an_older_log_was_put_back_all_stops_until_it_is_reset_and_nothing_happens_twice",
            "test_reset::test_a_log_whose_end_was_removed_from_its_storage_stops_loudly",
            "test_reset::test_marks_beyond_the_facts_stop_who_takes_over_so_that_no_stream_is_skipped",
            "test_reset::test_a_record_of_facts_that_are_not_there_is_not_gone_on_from_and_is_told_of",
            "test_chain::test_a_broken_chain_is_found_and_not_read",
            "test_fold::test_a_record_with_a_flipped_bit_is_no_snapshot_and_is_not_given_out",
            "test_nats::test_a_stream_that_is_made_anew_while_it_is_open_stops_all_loudly",
        ],
        {
            "": "That a changed entry stops its reader is tried on SQLite; the check is the same code on all three.",
        },
    ),
    Promise(
        "The same answer on every backend",
        "One acceptance rule (size, depth, NaN, NUL, surrogates, names) stands before all of them.",
        [
            *log("illegal names are refused before anything is written", "two names never collide"),
            "test_one_verdict::*",
            "test_hostile_keys::*",
            "test_messages::*refused*",
        ],
    ),
)


def collected(lines: Iterable[str]) -> Iterator[Held]:
    """Tests by their ids, as `tests/test_calls.py::test_a_call[nats]`, with the backends that are told by each."""
    for line in lines:
        path, _, name = line.strip().partition("::")
        test = f"{Path(path).stem}::{name}"
        told = name.partition("[")[2].rstrip("]").split("-")
        on = BACKENDS.keys() & set(told) or _by_module(test)
        yield Held(test, frozenset(on))


def _by_module(test: str) -> set[str]:
    for where, patterns in _SERVERS.items():
        if any(fnmatchcase(test, pattern) for pattern in patterns):
            return set(BACKENDS) if where == EVERYWHERE else {where}
    return {"sqlite"}


def held_by(promise: Promise, tests: Sequence[Held]) -> dict[str, frozenset[str]]:
    """Names of tests, each with the backends on which it runs. Raises `LookupError` for a pattern that finds none."""
    found: dict[str, frozenset[str]] = {}
    for pattern in promise.tests:
        bare, sentence, wanted = pattern.partition("[")
        begin, some = (f"{bare}[", wanted.rstrip("]").lstrip("*")) if sentence else (bare, "")
        for test, on in tests:
            whole, _, parameters = test.partition("[")
            if sentence and not (test.startswith(begin) and parameters.endswith(f"{some}]")):
                continue
            if not sentence and not fnmatchcase(whole, bare):
                continue
            name = f"{whole} {some.removeprefix('-')}".rstrip()
            found[name] = found.get(name, frozenset()) | on
            found.setdefault(name, on)
        if not any(_names(pattern, name) for name in found):
            raise LookupError(f"no test is {pattern}: mend tests/promises.py")
    return found


def _names(pattern: str, name: str) -> bool:
    bare, sentence, wanted = pattern.partition("[")
    return name == f"{bare} {wanted[2:-1]}" if sentence else fnmatchcase(name, bare)


def page(tests: Sequence[Held]) -> str:
    """The page of promises."""
    parts = [_HEAD]
    rows, chapters = list[str](), list[str]()
    for number, promise in enumerate(PROMISES, 1):
        held = held_by(promise, tests)
        marks = [_mark(promise, backend, held) for backend in BACKENDS]
        title = f"{number}. {promise.name}"
        rows.append(f"| {title} | {' | '.join(marks)} |")
        chapters.append(_chapter(title, promise, held))
    parts += [_TABLE, *rows, "", *chapters]
    return "\n".join(parts)


def _mark(promise: Promise, backend: str, held: Mapping[str, frozenset[str]]) -> str:
    if not any(backend in on for on in held.values()):
        return "no test"
    if promise.missing.get("", "").startswith("Not there yet"):
        return "in part"
    return "✓ but" if backend in promise.missing else "✓"


def _chapter(title: str, promise: Promise, held: Mapping[str, frozenset[str]]) -> str:
    lines = [f"## {title}", "", promise.says, "", f"| held by | {' | '.join(BACKENDS.values())} |", "|---|---|---|---|"]
    for name, on in held.items():
        module, _, test = name.partition("::")
        told = test.removeprefix("test_").replace("_", " ")
        ticks = " | ".join("✓" if backend in on else "" for backend in BACKENDS)
        lines.append(f"| [{told}](../tests/{module}.py) | {ticks} |")
    lines.append("")
    for backend, why in promise.missing.items():
        lines += [f"{BACKENDS[backend]}: {why}" if backend else why, ""]
    return "\n".join(lines)


_HEAD = """# The promises

What Cauce promises, on which backend, and which test holds it. This page is made by `python -m tests.promises --write` from
[tests/promises.py](../tests/promises.py), and a test fails when it is old. A tick means that the named test runs on that
backend; where it says "but" or "in part", the words below the table of the promise say what is missing.
"""
_TABLE = f"| | {' | '.join(BACKENDS.values())} |\n|---|---|---|---|"


def ids_of_a_collection() -> list[str]:
    """The ids that pytest collects in the files that are named here, in a process of its own."""
    files = sorted({f"tests/{pattern.partition('::')[0]}.py" for promise in PROMISES for pattern in promise.tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("tests/")]


def main() -> None:
    """Print the page, or write it where it belongs."""
    made = page(list(collected(ids_of_a_collection())))
    if "--write" in sys.argv[1:]:
        PAGE.write_text(made)
    else:
        sys.stdout.write(made)


if __name__ == "__main__":
    main()
