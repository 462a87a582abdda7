"""Plays cases on one engine and stores each run as soon as it is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sfi_agent.embedded import checkpoint_path
from sfi_agent.errors import ConfigError, InputError, SfiError, explain
from sfi_agent.evaluation.ablation.attempt import Attempt, Job, RunDone
from sfi_agent.evaluation.ablation.policy import DENSE, Policy
from sfi_agent.evaluation.ablation.records import failed_run
from sfi_agent.evaluation.ablation.store import ResultsFolder, write_atomically
from sfi_agent.evaluation.ablation.units import CaseKey, RunKey, case_keys
from sfi_agent.evaluation.tasks import task_named
from sfi_agent.plugins import build_detector, build_selector
from sfi_agent.problems import Problem, problem_lines

if TYPE_CHECKING:
    from sfi_agent.evaluation.ablation.grid import AblationGrid
    from sfi_agent.evaluation.tasks import Case, TokenCounter
    from sfi_agent.session.engine import Engine

__all__ = ["EMBEDDED", "CasePlayer", "load_engine"]

EMBEDDED = "embedded"
"""What grids write for the model that is shipped in the package."""


def load_engine(grid: AblationGrid, device: str | None = None) -> Engine:
    """The engine of a grid.

    Args:
        device: In place of the grid's; for workers that share several devices.

    Raises:
        CheckpointError: Nothing loadable is there.
        ConfigError: The device is not available.
        UnsupportedModelError: The model cannot be decoded slow-fast, with the reason.
    """
    from sfi_agent.session.engine import Engine

    place = device or grid.device
    with _without_loading_bars():
        if grid.model != EMBEDDED:
            return Engine.from_pretrained(grid.model, device=place, dtype=grid.dtype)
        # The embedded model is small, and CPUs are at their best in float32.
        dtype = "float32" if grid.dtype == "auto" else grid.dtype
        return Engine.from_pretrained(checkpoint_path(), device=place, dtype=dtype)


@contextmanager
def _without_loading_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class CasePlayer:
    """Plays the jobs of one grid on one engine.

    Args:
        engine: The model.
        grid: What is being run.
        policies: All policies, dense first.
        folder: Where runs are stored.
    """

    def __init__(
        self,
        engine: Engine,
        grid: AblationGrid,
        policies: Sequence[Policy],
        folder: ResultsFolder,
    ) -> None:
        self._engine = engine
        self._grid = grid
        self._policies = {policy.name: policy for policy in policies}
        self._folder = folder

    def check(self) -> None:
        """Find out whether the grid fits the model, before anything is computed.

        Raises:
            InputError: The checkpoint has no tokenizer.
            ConfigError: A policy does not fit the model, a plugin cannot be built with its
                tokenizer, or a task cannot make cases of a length; every problem is listed.
        """
        if self._engine.tokenizer is None:
            raise InputError(
                explain(
                    f"ran an ablation on {self._grid.model!r}",
                    got="a checkpoint without a tokenizer",
                    allowed="a checkpoint with a tokenizer: tasks are text",
                    remedy="add the tokenizer's files to its folder",
                )
            )
        problems = [
            problem
            for policy in self._policies.values()
            for problem in self._policy_problems(policy)
        ]
        problems += [
            problem
            for key in case_keys(self._grid)
            if key.case == 0 and key.seed == self._grid.seeds[0]
            for problem in self._length_problems(key)
        ]
        if problems:
            attempted = f"the grid does not fit the model {self._grid.model!r}"
            raise ConfigError(problem_lines(attempted, problems))

    def play(self, job: Job, done: RunDone) -> None:
        """Play a job; every run is stored before `done` hears of it.

        A policy that fails is stored as failed, and the other ones go on. An error before any
        policy has begun (the case cannot be made, or does not fit the model) fails them all.

        Raises:
            InputError: The system does not let files be written.
        """
        waiting = list(job.policies)
        while waiting:
            attempt = self._attempt(job, waiting, done)
            try:
                self._play_once(attempt)
                assert not waiting, f"{waiting} were not played"
            except Exception as error:
                if attempt.handing_over:
                    raise  # Nothing is wrong with the run, and no other one could be stored.
                for name in attempt.lost:
                    waiting.remove(name)
                    self._store_failure(RunKey(job.case, name), job, error)
                    done(RunKey(job.case, name), True)

    def _attempt(self, job: Job, waiting: list[str], done: RunDone) -> Attempt:
        return Attempt(job, waiting, self._grid.traces, self._folder, done, self._count_tokens())

    def _play_once(self, attempt: Attempt) -> None:
        from sfi_agent.evaluation.play import play_case

        key = attempt.job.case
        case = self._make_case(key)
        attempt.case = case
        play_case(
            self._engine,
            case,
            {name: self._policies[name].with_seed(key.seed) for name in [DENSE, *attempt.waiting]},
            protocol=key.protocol,
            answers=key.answers,
            on_session=attempt.begin,
            on_turn=attempt.note_turn,
            on_run=attempt.finish,
        )

    def _store_failure(self, key: RunKey, job: Job, error: Exception) -> None:
        folder = self._folder
        path = folder.failed_trace_path(key) if job.detailed else folder.run_path(key)
        write_atomically(path, failed_run(key, error))

    def _make_case(self, key: CaseKey) -> Case:
        return task_named(key.task).make_case(
            context_tokens=key.context_tokens,
            seed=key.case_seed,
            count_tokens=self._count_tokens(),
        )

    def _count_tokens(self) -> TokenCounter:
        from sfi_agent.evaluation.dialogue import token_counter

        return token_counter(self._engine.tokenizer)

    def _policy_problems(self, policy: Policy) -> list[Problem]:
        config, tokenizer = policy.config, self._engine.tokenizer
        checks: list[Callable[[], object]] = [lambda: self._engine.check_config(config)]
        if config.mode == "slow_fast":
            checks.append(lambda: build_selector(config.selector))
            checks += [
                lambda entry=entry: build_detector(entry, tokenizer)  # type: ignore[misc]
                for entry in config.boundaries
            ]
        problems = []
        for check in checks:
            try:
                check()
            except SfiError as error:
                problems.append(Problem("", f"policy {policy.name!r}: {error}"))
        return problems

    def _length_problems(self, key: CaseKey) -> list[Problem]:
        from sfi_agent.evaluation.conversation import longest_conversation_tokens
        from sfi_agent.evaluation.dialogue import Dialogue

        place = f"{key.task} with {key.context_tokens} context_tokens"
        limit = self._engine.shape.context_limit_tokens
        if key.context_tokens > limit:
            # Found out before the case is made, which takes its time at lengths like these.
            return [Problem(place, allowed=f"up to {limit} tokens, this model's context")]
        try:
            dialogue = Dialogue(self._engine, self._make_case(key))
        except SfiError as error:
            return [Problem(place, str(error))]
        needed = longest_conversation_tokens(dialogue)
        if needed > limit:
            got = f"{needed} tokens with template and longest answers"
            return [Problem(place, got=got, allowed=f"{limit} tokens, this model's context")]
        if key.protocol == "sparse_question" and not dialogue.first_prompt.question_start:
            remedy = "choose a task with a context, or dense_question"
            return [Problem(place, "sparse_question needs text before the question", remedy=remedy)]
        return []
