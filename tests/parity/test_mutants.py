"""Tests of the tests: each bug of this table, put into distft for a moment, must be found by the tests named beside it.

Those are the bugs that this kind of software is known to have had, and that no error message shows.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis.errors import HypothesisException

from distft.errors import DistftError
from distft.objectives.catalog import Eksft
from tests.helpers.mutants import Mutant
from tests.parity import (
    test_alignment,
    test_budget,
    test_export,
    test_live,
    test_normaliser,
    test_own_teacher,
    test_packing,
    test_papers,
    test_quadrants,
    test_resume,
)
from tests.unit.objectives import test_against_papers, test_catalog, test_collision, test_dense_teacher, test_loss
from tests.unit.teacher import test_cache, test_encode, test_forward, test_planes
from tests.unit.train import test_bad_numbers, test_batches


@dataclass(frozen=True)
class Guard:
    """A test that must fail, and what its parameters are."""

    test: Callable[..., None]
    given: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.test.__name__


def guard(test: Callable[..., None], **given: Any) -> Guard:
    return Guard(test, tuple(given.items()))


BY_HAND = guard(test_alignment.test_the_step_is_what_was_worked_out_by_hand)
CACHED = guard(test_alignment.test_the_cache_holds_what_was_worked_out_by_hand)
LIVE = guard(test_alignment.test_the_cache_is_the_live_model_at_every_position, family="llama_untied_padded", attention="sdpa")
FORMULAS = guard(test_loss.test_value_and_gradients_are_those_of_the_formulas, shape="all", weights="mixed", bias=True)
COLLISION = partial(guard, test_collision.test_value_and_gradient_are_those_of_the_formula, shape="plain", weights=None, chunk=4)
PUBLISHED = "eksft, published code"
EIGHT_WAYS = guard(test_normaliser.test_one_by_eight_two_by_four_and_eight_by_one_are_the_same_step, objective="stm_kl")
PACKED = guard(
    test_packing.test_packed_documents_see_themselves_alone, family="llama", attention="sdpa", end_to_end=False
)  # fmt: skip
RESUMED = guard(test_resume.test_five_steps_a_restart_and_five_more_are_ten, kind="float32")
DROPOUT = guard(test_resume.test_dropout_draws_the_same_numbers_after_a_restart)
STALE_WEIGHT = guard(test_cache.test_one_changed_weight_is_another_teacher)
STALE_TOKENS = guard(test_cache.test_two_swapped_token_ids_are_another_teacher)
STALE_POLICY = guard(test_cache.test_another_policy_or_precision_is_another_cache, other="k")

HAND = test_catalog.test_each_rule_does_what_was_worked_out_by_hand
REWARDS = test_catalog.test_published_eksft_rewards_entropy_more_where_there_is_little
HOLDS = test_catalog.test_published_eksft_holds_more_where_its_regulariser_is_above_two
PAPER = test_against_papers.test_loss_and_gradient_are_those_of_the_paper
STEP = test_papers.test_a_step_is_that_of_the_paper
STEP_IN_CHUNKS = test_papers.test_a_step_in_many_chunks_is_that_of_the_paper
CHUNKS = guard(
    test_loss.test_nothing_larger_than_a_chunk_of_logits_is_made, teacher="sparse", weights="kl", softcap=None, kind=torch.float32
)
ALL, EXACT = "all of the vocabulary", "hidden states"
FACTOR = test_live.test_a_factor_on_divergences_is_one_on_their_weights
CONTROLS = guard(test_catalog.test_controls_mask_as_many_tokens_as_the_paper_does, how={"tau": 1.5})

RULE = "distft.objectives.catalog."
WHOLE = "distft.objectives.whole:WholeChunk."
LOSS, CHUNK, DISTRIBUTIONS = "distft.objectives.loss:", "distft.objectives.chunk:Chunk.", "distft.objectives.distributions:"
BATCHES, TARGETS, ENGINE = "distft.train.batches:", "distft.train.targets:", "distft.engine.local:LocalEngine."
STEPPER = "distft.engine.step:Stepper."
LIVE_RULE = "distft.train.live:LiveTreatment."
FORWARD = "distft.teacher.forward:"

MUTANTS: dict[str, tuple[Mutant, list[Guard]]] = {
    # --- alignment
    "the student's predictor is the label's own place": (
        Mutant(f"{TARGETS}_predictors", "start + one.places - 1", "start + one.places"), [BY_HAND]),
    "the student's labels are the tokens before": (
        Mutant(f"{TARGETS}micro_batch", "document.tokens[one.places]", "document.tokens[one.places - 1]"), [BY_HAND]),
    "the teacher's predictor is the label's own place": (
        Mutant(f"{FORWARD}score_documents", "np.concatenate(flat) - 1", "np.concatenate(flat)"), [CACHED, LIVE]),
    "the teacher's first document is read for all": (
        Mutant(f"{FORWARD}score_documents", "start + where.astype(np.int64)", "layout.starts[0] + where.astype(np.int64)"), [LIVE]),
    "supervision is read one token early": (
        Mutant("distft.teacher.identity:scored_positions", "np.flatnonzero(document.supervised)",
               "np.maximum(1, np.flatnonzero(document.supervised) - 1)"), [CACHED]),
    # --- the loss
    "the tail is dropped from KL(q||p)": (
        Mutant(f"{CHUNK}_take_out_kept", "- teacher.tail_N * self.tail_ratio_C", ""),
        [FORMULAS, guard(test_loss.test_what_lies_in_the_tail_counts), BY_HAND]),
    "the tail is dropped from KL(p||q)": (
        Mutant(f"{CHUNK}_take_out_kept", "+ tail_share_C * self.tail_ratio_C", ""),
        [FORMULAS, guard(test_loss.test_what_lies_in_the_tail_counts)]),
    "the tail is dropped from the gradient": (
        Mutant(f"{CHUNK}gradient", "(kl_C * self.teacher.tail_N / self.tail_C)", "(0 * self.tail_C)"), [FORMULAS, BY_HAND]),
    "the teacher is renormalised on its top-k": (
        Mutant("distft.teacher.cache:sparse_rows", "minlength=len(counts_N)) + tail_N", "minlength=len(counts_N))"), [BY_HAND]),
    "the two directions of KL are exchanged": (
        Mutant(f"{CHUNK}_take_out_kept", "self.kl_C, self.rkl_C = forward_C.clamp_min(0.0), self.exact_rkl_C.clamp_min(0.0)",
               "self.rkl_C, self.kl_C = forward_C.clamp_min(0.0), self.exact_rkl_C.clamp_min(0.0)"),
        [FORMULAS, guard(test_loss.test_the_directions_are_not_each_other)]),
    "the gradient has the wrong sign of the entropy": (
        Mutant("distft.objectives.chunk:entropy_slope", ".mul_(bonus_B[:, None])", ".mul_(-bonus_B[:, None])"), [FORMULAS]),
    "padded head rows get mass": (
        Mutant("distft.corpus.render:token_rows", "+ 1", "+ 6"), [guard(test_forward.test_padded_head_rows_have_no_mass)]),
    "soft-capping is forgotten on the way back": (
        Mutant(f"{DISTRIBUTIONS}LogitShape.back", "grad_CV *= logits_CV.div_(self.softcap).square_().neg_().add_(1)", "pass"),
        [FORMULAS]),
    "a whole [tokens, vocabulary] is made": (
        Mutant(f"{LOSS}_TokenLoss.forward", "_chunks(len(hidden_ND), size)", "_chunks(len(hidden_ND), len(hidden_ND))"), [CHUNKS]),
    "a chunk's buffers live on beside the next one's": (
        Mutant(f"{LOSS}_TokenLoss.forward", "del logits_CV, seen_CV, chunk", "pass"), [CHUNKS]),
    "the head's gradient is made whole beside its sum": (
        Mutant(f"{LOSS}_add_product", "start + WEIGHT_ROWS)", "start + len(total_VD))"),
        [guard(test_loss.test_the_heads_gradient_is_made_without_a_second_one, kind=torch.bfloat16)]),
    "a kept token's log-probability is that of what float32 leaves of it": (
        Mutant(f"{CHUNK}_take_out_kept", "(logit_M - self.total_C.log()[self.row_M]).clamp_min(LOWEST)",
               "self.kept_M.clamp_min(TINY).log()"),
        [guard(test_loss.test_a_kept_token_that_the_student_never_says_counts_in_full, low=-1000.0)]),
    "every chunk has the first one's labels": (
        Mutant(f"{LOSS}_compare", "targets.labels_N[rows]", "targets.labels_N[: rows.stop - rows.start]"),
        [guard(STEP_IN_CHUNKS, teacher=ALL, case="talr"), guard(test_own_teacher.test_drift_in_many_chunks_is_the_same,
               distribution={"kind": "topk"})]),
    "every chunk has the first one's teacher": (
        Mutant(f"{LOSS}_compare", "targets.teacher.chunk(rows.start, rows.stop)", "targets.teacher.chunk(0, rows.stop - rows.start)"),
        [guard(STEP_IN_CHUNKS, teacher=ALL, case="eksft, prompt held"), guard(STEP_IN_CHUNKS, teacher=EXACT, case="sft_kl"),
         guard(test_own_teacher.test_drift_in_many_chunks_is_the_same, distribution={"kind": "hidden"})]),
    "tokens that are not held pay the teacher's head": (
        Mutant(f"{DISTRIBUTIONS}DenseRows.select", "chosen_N[row_K] = held_K", "chosen_N[row_K] = held_K = held_K | True"),
        [guard(test_dense_teacher.test_a_selection_of_a_selection_holds_what_both_hold)]),
    "a temperature's square is missing": (
        Mutant(f"{RULE}kd:Kd.treat", " * self.temperature**2", ""),
        [guard(test_dense_teacher.test_the_square_of_a_temperature_is_in_the_weights)]),
    # --- objectives
    "stm masks on the wrong side": (
        Mutant("distft.objectives.catalog.stm:Stm.kept", ">= -math.log", "<= -math.log"),
        [guard(test_catalog.test_each_rule_does_what_was_worked_out_by_hand, name="stm"),
         guard(test_alignment.test_stm_learns_the_one_token_that_the_teacher_finds_likely)]),
    "stm masks a token at its threshold": (
        Mutant("distft.objectives.catalog.stm:Stm.kept", ">= -math.log", "> -math.log"),
        [guard(test_catalog.test_stm_keeps_a_token_exactly_at_its_threshold_and_masks_the_next_one, tau=2.5)]),
    "stm counts the masked tokens": (
        Mutant("distft.objectives.catalog.stm:Stm.treat", ", count=kept", ""),
        [guard(test_catalog.test_each_rule_does_what_was_worked_out_by_hand, name="stm"),
         guard(test_alignment.test_stm_learns_the_one_token_that_the_teacher_finds_likely)]),
    "stm masks the lowest of a fraction": (
        Mutant(f"{RULE}stm:Stm.kept", "highest(-signals", "highest(signals"), [
            guard(PAPER, case="stm, a fraction"), guard(HAND, name="stm fraction")]),
    "stm's control masks all below tau, as the paper's": (
        Mutant(f"{RULE}stm:Stm.kept", "masked = len(kept) - int(kept.sum())", "masked = int(kept.sum())"),
        [CONTROLS, guard(PAPER, case="stm, the lowest")]),
    "stm's control draws with replacement": (
        Mutant(f"{RULE}stm:Stm._drawn", ".permutation(len(signals))[:count]", ".integers(0, max(1, len(signals)), count)"),
        [CONTROLS]),
    "stm's control forgets the document": (
        Mutant(f"{RULE}stm:Stm._drawn", "int(signals.document[:16], 16)", "0"),
        [guard(test_catalog.test_random_masks_follow_from_seed_and_document_alone)]),
    "among equals the later token is chosen": (
        Mutant("distft.objectives.treatment:highest", "np.argsort(-values, kind=\"stable\")[:count]",
               "np.argsort(values, kind=\"stable\")[::-1][:count]"),
        [guard(test_catalog.test_among_equals_the_earlier_token_is_chosen)]),
    "a share is rounded down in binary": (
        Mutant("distft.objectives.treatment:share_of", " + 1e-9", ""),
        [guard(test_catalog.test_a_share_is_meant_in_decimals)]),
    "stm_kl holds what it learns": (
        Mutant(f"{RULE}stm_kl:StmKl.treat", "(1 - kept)", "kept"),
        [guard(PAPER, case="stm_kl"), guard(HAND, name="stm_kl"),
         guard(test_catalog.test_stm_kl_learns_what_stm_learns_and_holds_the_rest)]),
    "sft_kl goes the other way": (
        Mutant(f"{RULE}sft_kl:SftKl.treat", 'self.direction == "', 'self.direction != "'),
        [guard(PAPER, case="sft_kl"), guard(PAPER, case="sft_kl backwards"), guard(HAND, name="sft_kl")]),
    "eksft punishes entropy": (
        Mutant(f"{RULE}eksft:Eksft.treat", "entropy=self._bonus", "entropy=-self._bonus"),
        [guard(PAPER, case="eksft"), guard(HAND, name="eksft")]),
    "eksft's divergence goes the other way": (
        Mutant(f"{RULE}eksft:Eksft.treat", "rkl=self", "kl=self"), [guard(PAPER, case="eksft"), guard(HAND, name="eksft")]),
    "eksft chooses by the other divergence": (
        Mutant(f"{RULE}eksft:Eksft.treat", "highest(live.rkl", "highest(live.kl"),
        [guard(PAPER, case="eksft"), guard(test_catalog.test_a_rule_reads_what_it_declares_and_nothing_else, name="eksft")]),
    "eksft gives its bonus to all that is masked": (
        Mutant(f"{RULE}eksft:Eksft.treat", "_spread(n, unsure)", "_spread(n, masked)"), [guard(PAPER, case="eksft")]),
    "eksft learns what it masks": (
        Mutant(f"{RULE}eksft:Eksft.treat", "ce=_spread(n, ~masked)", "ce=_spread(n, masked)"),
        [guard(PAPER, case="eksft"), guard(HAND, name="eksft")]),
    "eksft is a mean of its sequences' means": (
        Mutant(f"{RULE}eksft:_spread", "n / max", "1 / max"), [guard(PAPER, case="eksft")]),
    "eksft is a mean over all tokens of the step": (
        Mutant(f"{RULE}eksft:_spread", "n / max(1, int(chosen.sum()))", "1"), [guard(PAPER, case="eksft")]),
    "eksft's entropy is in nats": (
        Mutant(f"{RULE}eksft:Eksft._bonus", " / math.log(signals.vocabulary)", ""), [guard(PAPER, case="eksft")]),
    "published eksft's mask is shifted back": (
        Mutant(f"{RULE}eksft:Eksft._as_published", "np.append(masked[1:], np.zeros(min(n, 1), np.bool_))", "masked"),
        [guard(PAPER, case=PUBLISHED), guard(HAND, name="eksft published"), guard(STEP, teacher=ALL, case=PUBLISHED)]),
    "published eksft masks the token behind": (
        Mutant(f"{RULE}eksft:Eksft._as_published", "np.append(masked[1:], np.zeros(min(n, 1), np.bool_))", "np.roll(masked, 1)"),
        [guard(PAPER, case=PUBLISHED), guard(STEP, teacher=ALL, case=PUBLISHED)]),
    "published eksft scores what begins a run": (
        Mutant(f"{RULE}eksft:Eksft._as_published", "np.arange(n) > 0 if signals.follows is None", "np.arange(n) > 0 if True"),
        [guard(PAPER, case=PUBLISHED), guard(STEP, teacher=ALL, case=f"{PUBLISHED}, intersection")]),
    "published eksft is not told of runs": (
        Mutant(f"{BATCHES}Feed._treated", "follows=follows(document.supervised)", "follows=None"),
        [guard(STEP, teacher=teacher, case=f"{PUBLISHED}, intersection") for teacher in (ALL, EXACT)]),
    "published eksft has log p where the code has p": (
        Mutant(f"{RULE}eksft:Eksft._as_published", "entropy=bonus - held, collision=held", "entropy=bonus"),
        [guard(PAPER, case=PUBLISHED), guard(HAND, name="eksft published"), guard(STEP, teacher=EXACT, case=PUBLISHED)]),
    "published eksft forgets to nudge what holds": (
        Mutant(f"{RULE}eksft:Eksft._as_published", "self.lambda_kl * (UP if _mean(regulariser, moved) > TARGET_KL else DOWN)",
               "self.lambda_kl"),
        [guard(PAPER, case=PUBLISHED), guard(HAND, name="eksft published")]),
    "published eksft always nudges what holds down": (
        Mutant(f"{RULE}eksft:Eksft._as_published", "UP if _mean(regulariser, moved) > TARGET_KL else DOWN", "DOWN"),
        [guard(PAPER, case=PUBLISHED), guard(HAND, name="eksft published"), guard(STEP, teacher=ALL, case=PUBLISHED)]),
    "published eksft always nudges what holds up": (
        Mutant(f"{RULE}eksft:Eksft._as_published", "UP if _mean(regulariser, moved) > TARGET_KL else DOWN", "UP"),
        [guard(PAPER, case=f"{PUBLISHED}, of a sure student"), guard(HOLDS, rkl=0.1, entropy=0.1, collision=0.9, nudged=0.95)]),
    "published eksft nudges by the divergence": (
        Mutant(f"{RULE}eksft:Eksft._as_published", "live.rkl + live.entropy + live.collision", "live.rkl"),
        [guard(PAPER, case=PUBLISHED), guard(HAND, name="eksft published")]),
    "published eksft nudges by a regulariser without its collision": (
        Mutant(f"{RULE}eksft:Eksft._as_published", "live.entropy + live.collision", "live.entropy"),
        [guard(HAND, name="eksft published"), guard(HOLDS, rkl=0.55, entropy=0.5, collision=0.99, nudged=1.05)]),
    "published eksft nudges by the mean over all tokens": (
        Mutant(f"{RULE}eksft:Eksft._as_published", "_mean(regulariser, moved)", "_mean(regulariser, moved | True)"),
        [guard(HOLDS, rkl=0.1, entropy=0.1, collision=0.9, nudged=0.95)]),
    "published eksft forgets to nudge its bonus": (
        Mutant(f"{RULE}eksft:Eksft._as_published", "per_nat * (UP if sure else DOWN)", "per_nat"),
        [guard(PAPER, case=PUBLISHED), guard(HAND, name="eksft published")]),
    "published eksft nudges its bonus the other way": (
        Mutant(f"{RULE}eksft:Eksft._as_published", "UP if sure else DOWN", "DOWN if sure else UP"),
        [guard(PAPER, case=PUBLISHED), guard(PAPER, case=f"{PUBLISHED}, of a sure student"), guard(HAND, name="eksft published")]),
    "published eksft always nudges its bonus up": (
        Mutant(f"{RULE}eksft:Eksft._as_published", "UP if sure else DOWN", "UP"),
        [guard(PAPER, case=PUBLISHED), guard(REWARDS, entropy=0.51, nudged=0.95)]),
    "published eksft always nudges its bonus down": (
        Mutant(f"{RULE}eksft:Eksft._as_published", "UP if sure else DOWN", "DOWN"),
        [guard(PAPER, case=f"{PUBLISHED}, of a sure student"), guard(REWARDS, entropy=0.49, nudged=1.05)]),
    "published eksft's entropy is measured in nats": (
        Mutant(f"{RULE}eksft:Eksft._as_published", "sure = per_nat *", "sure = self.lambda_entropy *"),
        [guard(PAPER, case=f"{PUBLISHED}, of a sure student"), guard(REWARDS, entropy=0.49, nudged=1.05)]),
    "a rule that reads the collision is told the entropy": (
        Mutant("distft.train.live:_value", 'f"{name}_N"', 'f"{name}_N".replace("collision", "entropy")'),
        [guard(test_live.test_a_rule_of_sequences_is_told_the_collision)]),
    "published eksft weighs sequences by their tokens": (
        Mutant(f"{RULE}eksft:Eksft._as_published",
               "ce=_spread(1, learned), rkl=held, entropy=bonus - held, collision=held, count=1 / max(1, n)",
               "ce=_spread(n, learned), rkl=n * held, entropy=n * (bonus - held), collision=n * held"),
        [guard(PAPER, case=PUBLISHED), guard(STEP, teacher=ALL, case=PUBLISHED)]),
    "the collision leaves out what is kept": (
        Mutant(f"{CHUNK}_collision", "collision_C + self._row_sum(self.kept_M.square())", "collision_C"),
        [COLLISION(kind="truncated"), COLLISION(kind="all kept"), guard(STEP, teacher=ALL, case=PUBLISHED)]),
    "the collision's gradient has no mean on what is kept": (
        Mutant(f"{CHUNK}gradient", "(self.kept_M - self.collision_C[row_M])", "self.kept_M"),
        [COLLISION(kind="truncated"), COLLISION(kind="all kept")]),
    "the collision's gradient is half": (
        Mutant("distft.objectives.chunk:collision_pull", "2 * spread_B", "spread_B"),
        [COLLISION(kind="none"), COLLISION(kind="truncated"), COLLISION(kind="dense")]),
    "a dense teacher's student does not collide": (
        Mutant(f"{WHOLE}gradient", "if spread_C is not None:", "if False:"),
        [COLLISION(kind="dense"), COLLISION(kind="some dense"), guard(STEP, teacher=EXACT, case=PUBLISHED)]),
    "lwf learns what the teacher knows": (
        Mutant(f"{RULE}lwf:Lwf.learned", "label_logprob < math.log", "label_logprob >= math.log"),
        [guard(PAPER, case="lwf, floor"), guard(HAND, name="lwf"), guard(test_catalog.test_lwf_learns_what_stm_masks)]),
    "lwf exchanges label and teacher in an anchor's target": (
        Mutant(f"{RULE}lwf:Lwf.treat", "self.alpha * c, 0)", "self.alpha * (1 - c), 0)"),
        [guard(PAPER, case="lwf, given"), guard(HAND, name="lwf given")]),
    "lwf forgets the teacher's part of an anchor's target": (
        Mutant(f"{RULE}lwf:Lwf.treat", "self.alpha * (1 - c), self.beta", "0, self.beta"),
        [guard(PAPER, case="lwf, given"), guard(HAND, name="lwf")]),
    "lwf's groups have one normaliser": (
        Mutant(f"{RULE}lwf:Lwf.treat", '== "group_mean"', '== "none"'),
        [guard(PAPER, case="lwf, given by group"), guard(PAPER, case="lwf, floor by group")]),
    "lwf lifts every anchor all the way": (
        Mutant(f"{RULE}lwf:Lwf.confidence", "(lacking / (lacking + 1 - self.p_star))", "(1 + 0 * lacking)"),
        [guard(PAPER, case="lwf, floor's confidence"), guard(test_catalog.test_the_floors_confidence_gives_the_label_the_floor)]),
    "eaft learns where the student is sure": (
        Mutant(f"{RULE}eaft:Eaft.treat", "(unsure / HIGHEST)", "(1 - unsure / HIGHEST)"), [guard(PAPER, case="eaft")]),
    "eaft reads the entropy of all": (
        Mutant(f"{RULE}eaft:Eaft.treat", "student.top_entropy", "student.entropy"), [guard(PAPER, case="eaft")]),
    "dft learns what the student finds unlikely": (
        Mutant(f"{RULE}dft:Dft.treat", "np.exp(signals", "1 - np.exp(signals"), [guard(PAPER, case="dft")]),
    "asft holds backwards": (
        Mutant(f"{RULE}asft:Asft.treat", ", kl=", ", rkl="), [guard(PAPER, case="asft"), guard(HAND, name="asft")]),
    "asft divides by its weights": (
        Mutant(f"{RULE}asft:Asft.treat", ", kl=self.kl", ", kl=self.kl, count=np.exp(signals.student.label_logprob)"),
        [guard(PAPER, case="asft"), guard(test_catalog.test_counts_and_groups_do_not_depend_on_the_student, name="asft")]),
    "talr's temperature is of each token": (
        Mutant(f"{RULE}talr:Talr.treat", "logprob / tau", "logprob"), [guard(PAPER, case="talr")]),
    "talr cuts weights off above": (
        Mutant(f"{RULE}talr:Talr.treat", "np.maximum(np.exp", "np.minimum(np.exp"), [guard(PAPER, case="talr")]),
    "kd exchanges label and teacher": (
        Mutant(f"{RULE}kd:Kd.treat", "ce=1 - self.lam, kl=self.lam", "ce=self.lam, kl=1 - self.lam"), [guard(PAPER, case="kd")]),
    "a long prompt weighs more": (
        Mutant("distft.objectives.treatment:ObjectiveRule.prompt_weight", "self.softening**2 * supervised / prompt if",
               "self.softening**2 if"),
        [guard(test_against_papers.test_a_prompt_weighs_its_multiple_of_the_answer_however_long_it_is, prompt=200)]),
    # --- the student of the step, groups, prompts
    "a whole document's live signals are those of the token before": (
        Mutant(f"{LIVE_RULE}settle", "values[start:stop] for", "np.roll(values, 1)[start:stop] for"),
        [guard(STEP, teacher=ALL, case="eksft"), guard(STEP, teacher=EXACT, case="talr")]),
    "every document has the first one's live signals": (
        Mutant(f"{LIVE_RULE}settle", "values[start:stop] for", "np.resize(values, stop - start) for"),
        [guard(STEP, teacher=ALL, case="eksft"), guard(STEP, teacher=EXACT, case="talr")]),
    "a token's live rule is asked about the beginning of the batch": (
        Mutant(f"{LIVE_RULE}decide", "self.answers[rows]", "self.answers[: rows.stop - rows.start]"),
        [guard(STEP_IN_CHUNKS, teacher=ALL, case="asft, prompt held"),
         guard(STEP_IN_CHUNKS, teacher=EXACT, case="eaft, prompt held")]),
    "a chunk's prompt is held as the batch's first tokens are": (
        Mutant(f"{LIVE_RULE}decide", "self.fixed[rows]", "self.fixed[: rows.stop - rows.start]"),
        [guard(STEP_IN_CHUNKS, teacher=ALL, case="asft, prompt held"),
         guard(STEP_IN_CHUNKS, teacher=EXACT, case="eaft, prompt held")]),
    "the rule is told of twice the vocabulary": (
        Mutant("distft.train.stage:train_run", "vocabulary=engine.vocabulary", "vocabulary=2 * engine.vocabulary"),
        [guard(test_live.test_a_run_tells_the_rule_its_vocabulary)]),
    "the rule is not told of bfloat16's rounding": (
        Mutant("distft.train.stage:train_run", ", rounding=ROUNDING[_coarser(run)]", ""),
        [guard(test_normaliser.test_a_run_tells_the_rule_how_much_is_rounding)]),
    "a step that trains nothing is taken": (
        Mutant(f"{STEPPER}train_step", 'if not figures[FIGURES.index("counts")].any():', "if False:"),
        [guard(test_bad_numbers.test_a_live_rule_that_masks_a_whole_step_says_so, rule=Eksft)]),
    # --- the drift budget
    "what a budget measures is no part of the run": (
        Mutant("distft.train.identity:_measured", "run.objective.drift_budget is None", "True"),
        [guard(test_budget.test_under_a_budget_what_is_measured_is_part_of_the_run)]),
    "a periodic checkpoint forgets the control": (
        Mutant("distft.train.loop:_facts", "if budget else facts", "if False else facts"),
        [guard(test_budget.test_a_run_that_died_goes_on_from_its_last_periodic_checkpoint)]),
    "a token's live signals are read from the beginning of the batch": (
        Mutant(f"{LIVE_RULE}decide", "_floats(value)[answers]", "_floats(value)[: answers.sum()]"),
        [guard(STEP, teacher=ALL, case="asft, prompt held"), guard(STEP, teacher=EXACT, case="eaft, prompt held")]),
    "what is held is taken from other tokens than those that bear it": (
        Mutant(f"{LIVE_RULE}settle", "held_N[borne_N])", "held_N[borne_N].roll(1))"), [guard(STEP, teacher=ALL, case="eksft")]),
    "a token that only learns keeps its distribution": (
        Mutant(f"{DISTRIBUTIONS}SparseRows.select", "chosen_N[row_K] = held_K", "chosen_N[row_K] = held_K = held_K | True"),
        [guard(test_live.test_eksft_reads_the_teacher_again_only_of_what_it_holds)]),
    "what is not held says something": (
        Mutant(f"{DISTRIBUTIONS}SparseRows.select", "torch.where(held_K, self.tail_N[row_K], 1.0)", "self.tail_N[row_K]"),
        [guard(test_live.test_eksft_reads_the_teacher_again_only_of_what_it_holds)]),
    "the normalisers of groups are exchanged": (
        Mutant(f"{BATCHES}Step.normalised", "for total in totals), 1.0]", "for total in totals[::-1]), 1.0]"),
        [guard(STEP, teacher=ALL, case="lwf, by group"), guard(STEP, teacher=EXACT, case="lwf, by group, prompt held")]),
    "a group's tokens are divided by those of all": (
        Mutant(f"{BATCHES}Step.normalised", "normaliser / total if total else 0.0", "1.0"),
        [guard(STEP, teacher=ALL, case="lwf, by group")]),
    "the prompt is divided by a group's count": (
        Mutant(f"{BATCHES}Feed._treated", "group=rule.groups)", "group=0)"),
        [guard(STEP, teacher=ALL, case="lwf, by group, prompt held"),
         guard(test_live.test_a_prompt_is_held_also_where_the_step_has_no_token_of_the_first_group)]),
    "the prompt's tokens count": (
        Mutant(f"{BATCHES}Feed._treated", "count=0.0, group=rule.groups", "count=1.0, group=0"),
        [guard(STEP, teacher=ALL, case="sft, prompt held"), guard(STEP, teacher=EXACT, case="eaft, prompt held")]),
    "the prompt has the answer's scores": (
        Mutant(f"{BATCHES}Feed._treated", "own.followed_by(rest)", "rest.followed_by(own)"),
        [guard(STEP, teacher=ALL, case="sft, prompt held"), guard(STEP, teacher=EXACT, case="eksft, prompt held")]),
    "a factor on divergences is one on the cross-entropy": (
        Mutant(f"{TARGETS}scaled", "ce_N=targets.ce_N * factors,", "ce_N=targets.ce_N * factors * kl_factor,"),
        [guard(FACTOR, rule="cached"), guard(FACTOR, rule="by group")]),
    "a live factor on divergences is one on the cross-entropy": (
        Mutant(f"{LIVE_RULE}_weights", '("kl", "rkl")', '("ce", "kl", "rkl")'),
        [guard(FACTOR, rule="of single tokens"), guard(FACTOR, rule="of sequences"), guard(FACTOR, rule="nothing is held")]),
    "a factor forgets KL(p||q)": (
        Mutant(f"{TARGETS}scaled", "targets.rkl_N * factors * kl_factor", "targets.rkl_N * factors"),
        [guard(FACTOR, rule="backwards")]),
    "live weights reach the value and not the gradient": (
        Mutant(f"{LOSS}_TokenLoss.forward", "chunk.gradient(given.ce_N,", "chunk.gradient(given.ce_N * 0 + 1,"),
        [guard(STEP, teacher=ALL, case="dft"), guard(STEP, teacher=EXACT, case="eaft")]),
    "the loss mass of a part is not weighted": (
        Mutant("distft.engine.step:figures_of", "sign * (value_N * weight_N)", "sign * (value_N * borne_N)"),
        [guard(test_normaliser.test_one_by_eight_two_by_four_and_eight_by_one_are_the_same_step, objective="sft_kl")]),
    "the loss mass of a kind of tokens is another kind's": (
        Mutant(f"{LIVE_RULE}settle", "targets.quadrant_N[borne_N]", "targets.quadrant_N[: len(borne_N)]"),
        [guard(test_quadrants.test_a_step_tells_what_it_spent_on_each_kind, objective="eksft, some without a weight")]),
    "a dense teacher's divergence is seen from the student": (
        Mutant(f"{WHOLE}_compare", "-_row_dots(teacher_BV.exp(), ratio_BV)", "_row_dots(soft_BV.exp(), ratio_BV)"),
        [guard(STEP, teacher=EXACT, case="sft_kl")]),
    "a dense teacher's pull has no mean": (
        Mutant(f"{WHOLE}_pull", ".sub_(self.exact_rkl_C[where, None])", ""),
        [guard(STEP, teacher=EXACT, case="sft_kl backwards")]),
    "an infinity in the cache is no trouble": (
        Mutant("distft.teacher.cache:TeacherCache.scores", "if wrong:", "if False:"),
        [guard(test_bad_numbers.test_a_row_with_no_number_in_it_is_refused_by_name, case="tail"),
         guard(test_bad_numbers.test_hidden_states_are_looked_at_in_their_own_type, dtype="float32", word=0x7F80)]),
    # --- one normaliser, one order
    "the mean of micro-batch means": (
        Mutant(f"{ENGINE}_pass", "(weighted_sum / normaliser).backward()",
               "(weighted_sum / max(1, len(batch.predictor_N))).backward()"), [EIGHT_WAYS]),
    "gradients of micro-batches add up in bfloat16": (
        Mutant(f"{ENGINE}_gather_gradients", "master.grad += parameter.grad",
               "master.grad = (master.grad.bfloat16() + parameter.grad).float()"),
        [guard(test_normaliser.test_bfloat16_micro_batches_add_up_in_float32)]),
    "the order of an epoch forgets the epoch": (
        Mutant("distft.train.order:epoch_order", "np.array([seed, epoch], np.uint64)", "np.array([seed, 0], np.uint64)"),
        [guard(test_batches.test_the_order_of_an_epoch_is_pinned)]),
    "a rank draws an order of its own": (
        Mutant(f"{BATCHES}Feed.step", "    batches = ", "    rows = (rows + self.world.rank) % len(self.lengths)\n    batches = "),
        [guard(test_batches.test_any_number_of_ranks_consumes_the_same_tokens_per_step, size=2)]),
    "what does not come out even is left out": (
        Mutant(f"{BATCHES}share", "-(-len(batches) // teams)", "len(batches) // teams"),
        [guard(test_batches.test_any_number_of_ranks_consumes_the_same_tokens_per_step, size=3)]),
    # --- packing
    "documents of a row see each other": (
        Mutant("distft.engine.load:LanguageModel.hidden", "None, use_cache=False", "None, use_cache=True"), [PACKED]),
    "positions run on through a row": (
        Mutant("distft.engine.pack:pack", "= np.arange(len(document))", "= start % layout.width + np.arange(len(document))"),
        [PACKED]),
    # --- resume
    "a resumed optimizer begins its moments anew": (
        Mutant(f"{ENGINE}restore_slices", "copy_(getattr(piece, part))",
               'copy_(getattr(piece, part) * (part != "exp_avg_sq"))'), [RESUMED]),
    "a resumed optimizer forgets its step": (
        Mutant(f"{ENGINE}restore_slices", "torch.tensor(float(optimizer_steps), device=self.device)", "torch.tensor(0.0)"), [RESUMED]),
    "a resumed run repeats a step": (
        Mutant("distft.train.stage:train_run", "first_step=done + 1", "first_step=max(1, done)"), [RESUMED]),
    "the schedule starts again": (
        Mutant("distft.train.loop:train", "learning_rate(config, step, plan.total_steps)",
               "learning_rate(config, step - first_step + 1, plan.total_steps)"), [RESUMED]),
    "randomness of a step depends on what was before": (
        Mutant("distft.train.loop:train", "torch.manual_seed(_step_seed(config.seed, step, world.rank))",
               "torch.manual_seed(0) if step == first_step else None"), [DROPOUT]),
    "a checkpoint's bytes are not checked": (
        Mutant("distft.store.blocks:check_block", "if found != promised:", "if not found:"),
        [guard(test_resume.test_a_damaged_checkpoint_is_named_and_the_one_before_serves, damage="weight")]),
    "a checkpoint of other settings is taken up": (
        Mutant("distft.train.checkpoint:Checkpoints._own", "if changed:", "if False:"),
        [guard(test_resume.test_a_run_is_not_taken_up_under_other_settings, change="lr")]),
    # --- the cache
    "a shard's bytes are not checked": (
        Mutant("distft.store.manifest:_problem", "return None if found == entry.sha256", "return None if found"),
        [guard(test_cache.test_a_damaged_shard_is_refused_before_it_is_read, damage="flipped")]),
    "weights are no part of a teacher's identity": (
        Mutant("distft.teacher.identity:teacher_identity", '"weights": folder.weights_identity()', '"weights": "any"'),
        [STALE_WEIGHT]),
    "the vocabulary is no part of a teacher's identity": (
        Mutant("distft.teacher.identity:teacher_identity", 'folder.tokenizer_identity()["vocabulary"]', '"any"'), [STALE_TOKENS]),
    "the policy is no part of a teacher's identity": (
        Mutant("distft.teacher.identity:teacher_identity", "score.distribution.model_dump()", '{"kind": "any"}'), [STALE_POLICY]),
    "a row is joined by its place": (
        Mutant("distft.teacher.cache:TeacherCache.scores", "number, row = self.places[document.digest]",
               "number, row = sorted(self.places.values())[document.row - 1]"),
        [guard(test_cache.test_each_document_is_read_once_and_a_second_run_loads_nothing)]),
    "kept ids are in no order": (
        Mutant(f"{FORWARD}_kept", ".indices.sort(1).values", ".indices"), [LIVE]),
    "the tail is one minus the rest": (
        Mutant(f"{FORWARD}score_logits", "tail_C = (left_C1 / total_C1).squeeze(1)",
               "tail_C = 1 - torch.zeros(len(exp_CV)).index_add(0, row_M, kept_M.exp())"),
        [guard(test_forward.test_a_sure_teachers_tail_is_exact_where_one_minus_the_rest_is_zero)]),
    "a crowded row keeps everything": (
        Mutant(f"{FORWARD}_kept", "others = ~torch.isin(row_M, crowded)", "others = row_M >= 0"),
        [guard(test_forward.test_a_crowded_row_keeps_its_best_k_and_does_not_disturb_its_neighbours)]),
    "draws are not spread over the strata": (
        Mutant(f"{FORWARD}_points", "np.arange(distribution.draws) + ", "distribution.draws / 2 + "),
        [guard(test_forward.test_draws_are_unbiased_and_few)]),
    "what draws overstate is not taken off": (
        Mutant("distft.teacher.cache:sampling_excess", "return scores.entropy.astype(np.float64) - entropy_N", "return 0 * entropy_N"),
        [guard(test_cache.test_drift_from_draws_is_an_unbiased_estimate)]),
    "differences run on over the border of a token": (
        Mutant("distft.teacher.planes:_differences", "changed[first] = values[first]", "pass"),
        [guard(test_planes.test_the_extremes_of_every_type)]),
    "counts are not checked": (
        Mutant("distft.teacher.encode:PlainShard.read", "kept != len(scores.ids) or kept != len(scores.logprobs)", "False"),
        [guard(test_encode.test_columns_that_contradict_each_other_are_refused, wrong="a count too high")]),
    "documents are scored again": (
        Mutant("distft.teacher.build:build_teacher", "if digest not in held]", "]"),
        [guard(test_cache.test_a_larger_corpus_costs_its_new_documents_alone)]),
    "the own-teacher check compares means": (
        Mutant("distft.train.drift:check_own_teacher", "drift.label_gap <= 10 * limit",
               "abs(drift.nll - drift.teacher_nll) <= 10 * limit"),
        [guard(test_own_teacher.test_signals_alone_betray_it_too, damage="each token has the next one's")]),
    "nobody asks whether the model is its own teacher": (
        Mutant("distft.train.stage:train_run", "check_own_teacher(engine.measure", "(lambda *_, **__: None)(engine.measure"),
        [guard(test_own_teacher.test_a_cache_that_is_about_other_tokens_is_refused, damage="rows are swapped", dtype="float32")]),
    # --- export
    "the model is exported as it was before training": (
        Mutant("distft.export.write:stored_bytes", "_bytes_of(run.to(source.dtype))",
               "_bytes_of(torch.zeros_like(run.to(source.dtype)))"),
        [guard(test_export.test_transformers_computes_the_engines_logits, family="llama")]),
}  # fmt: skip


class Fixtures:
    """What a guard may ask for, fresh for each call."""

    def __init__(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.tmp_path, self.capsys = tmp_path, capsys

    def call(self, guard: Guard) -> None:
        given, folder = dict(guard.given), self.tmp_path / "guard"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            known = {
                "tmp_path": lambda: folder,
                "monkeypatch": lambda: patch,
                "capsys": lambda: self.capsys,
                "read": lambda: watched(patch),
                "lab_of": lambda: partial(test_papers.scored, folder),
            }
            wanted = [name for name in inspect.signature(guard.test).parameters if name not in given]
            guard.test(**given, **{name: known[name]() for name in wanted})


def watched(patch: pytest.MonkeyPatch) -> list[bytes]:
    """As the fixture `read` of the cache's tests."""
    plain, seen = test_cache.score_documents, []

    def watching(model: Any, documents: Any, *rest: Any) -> Any:
        seen.extend(one.tobytes() for one in documents)
        return plain(model, documents, *rest)

    patch.setattr("distft.teacher.scorer.score_documents", watching)
    return seen


FOUND = (AssertionError, DistftError, HypothesisException, pytest.fail.Exception)
"""How a test may find a bug: it was wrong, it was refused, or it was not refused. A crash of the mutant itself is no finding."""


@pytest.fixture
def fixtures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fixtures:
    return Fixtures(tmp_path, capsys)


@pytest.mark.parametrize("bug", MUTANTS)
def test_the_bug_is_found(bug: str, fixtures: Fixtures) -> None:
    mutant, guards = MUTANTS[bug]
    assert guards
    for each in guards:
        with pytest.MonkeyPatch.context() as patch:
            mutant.apply(patch)
            try:
                fixtures.call(each)
            except FOUND:
                continue
        pytest.fail(f"{each} does not see that {bug}")


def test_the_guards_pass_without_a_bug(fixtures: Fixtures) -> None:
    """One of each kind here; all of them run as tests of their own."""
    for each in (BY_HAND, FORMULAS, STALE_POLICY):
        fixtures.call(each)


def test_a_mutant_that_no_longer_fits_is_an_error() -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(LookupError, match="0 times"):
        Mutant("distft.train.order:cut_steps", "what is not there", "x").apply(patch)
