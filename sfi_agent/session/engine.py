"""The Engine: a model ready for slow-fast decoding, and the maker of sessions."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sfi_agent.config import SessionConfig
from sfi_agent.engine.model_shape import inspect_model
from sfi_agent.engine.runner import Runner
from sfi_agent.engine.self_check import check_model
from sfi_agent.engine.switch import AttentionSwitch
from sfi_agent.errors import ConfigError, InputError, TemplateError, explain
from sfi_agent.observe.log import log_event
from sfi_agent.observe.telemetry import Telemetry, default_telemetry
from sfi_agent.session.arguments import at_least
from sfi_agent.session.asynchronous.engine_thread import EngineThread
from sfi_agent.session.checkpoint import find_device, find_dtype, load_model, load_tokenizer
from sfi_agent.session.engine_parts import check_parts
from sfi_agent.session.parking import ParkingLimits, ParkingLot
from sfi_agent.session.policy_check import check_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Self

    from sfi_agent.engine.parked_buffers import Place
    from sfi_agent.engine.warmup import WarmUpReport
    from sfi_agent.session.overflow import OverflowPolicy
    from sfi_agent.session.session import Session
    from sfi_agent.session.templates.template_report import TemplateReport
    from sfi_agent.session.tool_use.tools import Tool

__all__ = ["Engine"]


class Engine:
    """A causal language model with its tokenizer, from which sessions are opened.

    Weights are loaded once and serve many sessions. Nothing about the model changes until a
    session opens; when the last open one closes, the model is as it was.

    Args:
        model: A causal language model of transformers in eval mode, on one device.
        tokenizer: Needed for text, messages and tools; `session.decode` works without.
        prefill_chunk_tokens: Tokens per prefill pass; None chooses by device.
        execution: "auto" captures steps of one token, and blocks of rectify and verify, as CUDA
            graphs on a CUDA device, and is eager elsewhere; "eager" never captures.
        check_numbers: Whether numbers that are not finite, in attention or logits, raise
            `NumericsError`, for debugging; steps are then eager, and the host waits for each layer.
        telemetry: How sessions tell OpenTelemetry what they do; None tells the program's own
            providers, if there are any, without content.
        parking: When idle sessions are parked by themselves; None leaves it to `park`.

    Attributes:
        shape: What was found about the model (layers, windows, context limit).

    Raises:
        UnsupportedModelError: The model cannot be decoded slow-fast, with the reason.
        ConfigError: `execution` is unknown.
        InputError: Another argument is not usable.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        prefill_chunk_tokens: int | None = None,
        execution: Literal["auto", "eager"] = "auto",
        check_numbers: bool = False,
        telemetry: Telemetry | None = None,
        parking: ParkingLimits | None = None,
    ) -> None:
        check_parts(model, tokenizer, telemetry, parking)
        if prefill_chunk_tokens is not None:
            at_least("prefill_chunk_tokens", prefill_chunk_tokens, 1)
        self.model = model
        self.tokenizer = tokenizer
        self.shape = inspect_model(model)
        if execution not in ("auto", "eager"):
            allowed = "'auto' or 'eager'"
            raise ConfigError(explain("made an Engine", got=repr(execution), allowed=allowed))
        self.runner = Runner(
            model,
            self.shape,
            prefill_chunk_tokens,
            execution=execution,
            check_numbers=check_numbers,
        )
        self.thread = EngineThread()
        self.telemetry = telemetry if telemetry is not None else default_telemetry()
        self.parking = ParkingLot(self.runner, parking or ParkingLimits())
        if AttentionSwitch.of(model).users == 0:
            # With open sessions on it the model has been checked already.
            error = check_model(model, self.shape)
            log_event("debug", "model_checked", model=type(model).__name__, relative_error=error)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        prefill_chunk_tokens: int | None = None,
        execution: Literal["auto", "eager"] = "auto",
        check_numbers: bool = False,
        telemetry: Telemetry | None = None,
        parking: ParkingLimits | None = None,
    ) -> Engine:
        """Load a checkpoint from a directory or from the Hugging Face Hub.

        Args:
            path: Directory or Hub id.
            device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
            dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
            prefill_chunk_tokens, execution, check_numbers, telemetry, parking: See `Engine`.

        Raises:
            CheckpointError: Nothing loadable is there, or a part of it is missing or damaged.
            ConfigError: `device` or `dtype` is unknown or not available.
            InputError: Another argument is not usable.
            UnsupportedModelError: The model cannot be decoded slow-fast, with the reason.
        """
        place, number_type = find_device(device), find_dtype(dtype)
        model, tokenizer = load_model(path, number_type), load_tokenizer(path)
        torch.nn.Module.to(model, place)
        return cls(
            model,
            tokenizer,
            prefill_chunk_tokens=prefill_chunk_tokens,
            execution=execution,
            check_numbers=check_numbers,
            telemetry=telemetry,
            parking=parking,
        )

    def session(
        self,
        config: SessionConfig | None = None,
        *,
        system: str | None = None,
        tools: Sequence[Callable[..., Any] | Tool] = (),
        overflow: OverflowPolicy = "error",
    ) -> Session:
        """A new session on this model.

        Args:
            config: The policy; None takes the defaults.
            system: System prompt of the conversation.
            tools: Plain functions with type hints and a Google-style docstring, or `Tool`s. They
                are sorted by name and fixed for the session.
            overflow: What happens when a turn does not fit the model's context, or leaves no room
                for `max_new_tokens`: "error" raises `ContextOverflowError` (and a lack of room
                only shortens the answer); a function is given an `Overflow` and returns the
                messages to go on with, such as `drop_oldest_turns()`.

        Raises:
            ConfigError: The policy does not fit the model (a dense layer it does not have).
            InputError: `overflow` is neither "error" nor a function, or `system` is no text.
            SessionStateError: The engine is closed.
            ToolDefinitionError: A tool cannot be described or called.
            TemplateError: System prompt or tools are given and the chat template takes none.
        """
        from sfi_agent.session.session import Session

        self.thread.require_open("opened a session")
        chosen = SessionConfig() if config is None else config
        self.check_config(chosen)
        return Session.create(self, chosen, system, tools, overflow)

    def load_session(
        self,
        directory: str | os.PathLike[str],
        *,
        tools: Sequence[Callable[..., Any] | Tool] | None = None,
        config: SessionConfig | None = None,
        overflow: OverflowPolicy = "error",
        on_mismatch: Literal["error", "reprefill"] = "error",
        check: Literal["full", "sizes"] = "full",
    ) -> Session:
        """A saved session, open, with its keys and values: it goes on as if it had never stopped.

        Args:
            directory: What `session.save` wrote to.
            tools: The functions of its tools; None loads it with their schemas alone, so that
                `send` and `decode` work and `run` and `stream` do not.
            config: The policy it must have been saved with; None takes whatever that is.
            overflow: As in `session`.
            on_mismatch: What happens where model, weights, dtype, tokenizer, chat template, tools
                or policy are not those of the saved session: "error" refuses; "reprefill" gives
                its keys and values up and processes its ids, or renders its messages, again.
            check: "full" compares every byte with what was written; "sizes" only lengths and
                headers of the files.

        Raises:
            StoreMismatchError: Something is not as it was; lists all that is not.
            StoreError: No session is there, or it is damaged, or written by a newer version.
            ConfigError: `config` does not fit the model.
            InputError: An argument is not usable.
            SessionStateError: The engine is closed.
            ToolDefinitionError: A tool cannot be described or called.
            TemplateError: The chat template takes no system prompt or no tools.
        """
        from sfi_agent.session.store.loading import load_session

        self.thread.require_open("loaded a session")
        return load_session(self, directory, tools, config, overflow, on_mismatch, check)

    def decode_batch(
        self,
        sessions: Sequence[Session],
        token_ids: Sequence[Sequence[int]] | None = None,
        *,
        max_new_tokens: int | Sequence[int | None] | None = None,
        stop_ids: Collection[int] = (),
    ) -> list[list[int]]:
        """Decode on many sessions together: one pass over the weights for a token of each.

        Each session keeps its policy, segment and kind of step; slow and fast rows share a pass.
        What a session generates does not depend on the others, up to the rounding of matrix
        products.

        Args:
            sessions: Distinct sessions of this engine.
            token_ids: New ids of each, as in `Session.decode`; None goes on from the pending
                tokens.
            max_new_tokens: For all, or one per session; None takes each session's
                `sampling.max_new_tokens`.
            stop_ids: As in `Session.decode`, for all.

        Returns:
            The generated ids of each session.

        Raises:
            InputError, NothingPendingError, ContextOverflowError, SessionBusy, SessionStateError:
                As in `Session.decode`, before anything is processed; every session is as before.
        """
        from sfi_agent.session.batch import decode_batch

        return decode_batch(self, sessions, token_ids, max_new_tokens, stop_ids)

    def park(
        self,
        session: Session,
        to: Place | None = None,
        *,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        """Move an idle session's keys and values out of the way; its next call brings them back.

        What a fork shares moves when none of the sessions that read it is left on the device. Ids,
        messages and records stay, and nothing is lost. Parked again, a session goes further: from
        host memory to disk.

        Args:
            session: Open, of this engine.
            to: "host" memory or "disk"; None is host memory, and on a CPU disk, if there is a
                directory. On a CPU "host" frees the memories alone.
            directory: Where files go on disk; None is that of `ParkingLimits`.

        Raises:
            InputError: The place is unknown or lacks a directory, or the session is of another
                engine.
            StoreError: The directory cannot be written; the session is where it was.
            SessionBusy: A call on the session is under way.
            SessionStateError: The session is closed.
        """
        owner = getattr(session, "engine", None)
        if owner is not self:
            got = "one of another engine" if isinstance(owner, Engine) else repr(session)
            raise InputError(explain("parked a session", got=got, allowed="one of this engine"))
        with session._owner.held_for("park"):
            session._core.open()
            self.parking.park(session._core, to, directory)

    def warmup(
        self,
        config: SessionConfig | None = None,
        *,
        batch: int = 1,
        context_tokens: int = 0,
        compiled: bool = True,
        early_launch: bool = True,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> WarmUpReport:
        """Compile and capture the steps that a policy takes, before they are needed.

        Without it steps are captured when they first happen, and the model's layers stay as they
        are: compiling them takes from seconds (with the cache of an earlier process) to minutes
        and makes steps of single tokens faster. On a CPU there is nothing to prepare.

        Args:
            config: The policy; None takes the defaults.
            batch: Sessions that will be decoded together.
            context_tokens: Longest history to prepare for, so that nothing is captured anew as it
                grows; 0 prepares for short ones.
            compiled: Whether to compile the layers.
            early_launch: Whether compiled kernels may start while the one before them finishes
                (programmatic dependent launch, on cards that have it): a few per cent faster, the
                same output.
            on_progress: Told what is being prepared.

        Raises:
            InputError: A number is not usable.
            ContextOverflowError: The model does not take histories of this length.
        """
        from sfi_agent.session.warmup import warm_up

        chosen = SessionConfig() if config is None else config
        self.check_config(chosen)
        return warm_up(
            self,
            chosen,
            batch,
            context_tokens,
            on_progress,
            compiled=compiled,
            early_launch=early_launch,
        )

    def close(self) -> None:
        """End the engine's thread and wait for it; closing twice is fine.

        Asynchronous calls under way raise `SessionStateError`, and keep what they have generated.
        Open sessions can still be used by synchronous calls; there will be no new ones.
        """
        self.thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_config(self, config: SessionConfig) -> None:
        """Refuse a policy that does not fit this model.

        Raises:
            ConfigError: It is no SessionConfig, or names a dense layer the model does not have.
        """
        check_policy(config, self.shape)

    def check_template(self) -> TemplateReport:
        """Try the tokenizer's chat template on probes: what sessions can and cannot do with it.

        Raises:
            TemplateError: There is no tokenizer, or it has no chat template.
        """
        from sfi_agent.session.templates.template_report import check_template

        if self.tokenizer is None:
            raise TemplateError(
                explain(
                    "checked the chat template",
                    got="an engine without a tokenizer",
                    remedy="give Engine a tokenizer with a chat template",
                )
            )
        return check_template(self.tokenizer)

    def __repr__(self) -> str:
        shape = self.shape
        dtype = str(shape.dtype).removeprefix("torch.")
        tokenizer = "None" if self.tokenizer is None else type(self.tokenizer).__name__
        return (
            f"Engine({type(self.model).__name__}, {shape.num_layers} layers, {dtype}, "
            f"device={str(shape.device)!r}, context={shape.context_limit_tokens} tokens, "
            f"tokenizer={tokenizer})"
        )
