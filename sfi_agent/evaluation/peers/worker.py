"""Plays the cases of a plan file with transformers alone, or with a press of kvpress on top.

    python -I worker.py versions
    python -I worker.py play PLAN RESULTS

Run as a script by the Python of an environment that has no sfi-agent, so it imports nothing of
ours; `exchange.py` says what goes in and out. kvpress replaces every attention function of the
process that imports it, so only an arm that uses it imports it.

The way an arm plays is "generate": `model.generate` gets the whole prompt of a turn and the cache
of the turn before, as users write it, and decides what to feed, which is recorded. Or it is
"explicit": new tokens alone are fed, at the positions that they have in the conversation whatever
the length of the cache. After an eviction that is the only right way.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["cache_keyword", "compression_ratio", "main", "play", "versions"]


def versions() -> dict[str, str | None]:
    """Python and the versions of the packages that matter here; None for one that is missing."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "kvpress"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def compression_ratio(prompt_tokens: int, kept_tokens: int) -> float:
    """The ratio with which a press keeps exactly `kept_tokens` of a prompt; 0 keeps all.

    A press keeps `int(prompt_tokens * (1 - ratio))`; half a token more than wanted survives
    the rounding of that product.
    """
    return max(0.0, 1.0 - (kept_tokens + 0.5) / prompt_tokens)


class Feeds:
    """What the model was fed in one turn.

    Args:
        first_index: Index in the conversation of the first token that no turn has fed yet.
        prompt_ends: Ends of the passes over the prompt, as indices; decode steps follow the last.

    Attributes:
        fed_tokens: Tokens of the passes over the prompt.
        fed_again_tokens: Those of them that an earlier pass had processed already.
        wrong_positions: Tokens fed elsewhere than at their index, in decode steps too.
        read_tokens: Tokens that decode steps attended to, summed over steps, averaged over layers.
        first_step_seconds: When the first decode step began, on the clock `time.perf_counter`.
    """

    def __init__(self, first_index: int, prompt_ends: list[int]) -> None:
        self.first_index = first_index
        self.prompt_tokens = prompt_ends[-1]
        self.fed_tokens = 0
        self.fed_again_tokens = 0
        self.wrong_positions = 0
        self.read_tokens = 0.0
        self.first_step_seconds: float | None = None
        self._prompt_ends = list(prompt_ends)
        self._processed = first_index

    def note(self, positions: list[int], cached_tokens: float) -> None:
        """One pass over tokens at these positions; `cached_tokens` lie in the cache already."""
        tokens = len(positions)
        if self._prompt_ends:
            # However many there are: they are the last ones before the end of the pass.
            end = self._prompt_ends.pop(0)
            self.fed_tokens += tokens
            self.fed_again_tokens += max(0, self._processed - (end - tokens))
        else:
            end = self._processed + tokens
            self.read_tokens += cached_tokens + tokens
            if self.first_step_seconds is None:
                self.first_step_seconds = time.perf_counter()
        self._processed = end
        indices = range(end - tokens, end)
        self.wrong_positions += sum(
            position != index for position, index in zip(positions, indices, strict=True)
        )


def cache_tokens(cache: Any) -> float:
    """Tokens in a cache, averaged over its layers."""
    lengths = [cache.get_seq_length(layer) for layer in range(len(cache))]
    return sum(lengths) / len(lengths) if lengths else 0.0


def cache_keyword(model: Any) -> str:
    """The name under which a model takes its cache; transformers 5.24 gave it a new one."""
    names = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def make_press(arm: dict[str, Any], prompt_tokens: int) -> Any:
    """The press of an arm for a prompt of that length; None for an arm without one."""
    if arm["press"] is None:
        return None
    kvpress: Any = importlib.import_module("kvpress")
    press, options = getattr(kvpress, arm["press"]), arm["options"]
    if arm["evicts"] == "prefill":
        ratio = compression_ratio(prompt_tokens, arm["kept_tokens"])
        return press(compression_ratio=ratio, **options)
    return kvpress.DecodingPress(base_press=press(), target_size=arm["kept_tokens"], **options)


class Conversation:
    """One arm on one case, turn by turn; both are entries of the plan."""

    def __init__(self, model: Any, arm: dict[str, Any], case: dict[str, Any]) -> None:
        from transformers import DynamicCache

        self.model, self.arm, self.case = model, arm, case
        self.cache: Any = DynamicCache()
        self.given_cache = {cache_keyword(model): self.cache}
        self.ids: list[int] = []
        self.processed_tokens = 0

    def play(self) -> list[dict[str, Any]]:
        """A record per turn; a turn that raises ends the conversation with the error's text."""
        take_turn = self._explicit if self.arm["way"] == "explicit" else self._generate
        records: list[dict[str, Any]] = []
        with contextlib.ExitStack() as stack:
            for index in range(len(self.case["turns"])):
                start = time.perf_counter()
                try:
                    record = take_turn(index, stack)
                except Exception as error:
                    # What a peer raises is a finding of the comparison, whatever its type.
                    records.append({"error": f"{type(error).__name__}: {error}"})
                    break
                record["seconds"] = time.perf_counter() - start
                records.append(record)
        return records

    def _append_prompt(self, index: int) -> None:
        """Put the ids of a turn's prompt behind the conversation."""
        if index == 0:
            self.ids += self.case["context_ids"]
        elif self.ids[-1] not in self.case["stop_ids"]:
            self.ids += self.case["closing_ids"]
        self.ids += self.case["turns"][index]["ids"]

    def _generate(self, index: int, stack: contextlib.ExitStack) -> dict[str, Any]:
        import torch

        self._append_prompt(index)
        prompt_tokens, turn = len(self.ids), self.case["turns"][index]
        feeds = Feeds(self.processed_tokens, [prompt_tokens])
        prompt = torch.tensor([self.ids], device=self.model.device)
        if index == 0:
            press = make_press(self.arm, prompt_tokens)
            if press is not None:
                stack.enter_context(press(self.model))
        with torch.no_grad(), recorded(self.model, feeds.note):
            output = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=turn["max_new_tokens"],
                eos_token_id=self.case["stop_ids"],
                pad_token_id=self.case["stop_ids"][0],
                do_sample=False,
                **self.given_cache,
            )
        new_ids = output[0, prompt_tokens:].tolist()
        self.ids += new_ids
        self.processed_tokens = len(self.ids) - 1
        return self._record(new_ids, feeds)

    def _explicit(self, index: int, stack: contextlib.ExitStack) -> dict[str, Any]:
        self._append_prompt(index)
        ends = [len(self.ids)]
        if index == 0 and self.case["protocol"] == "sparse_question":
            ends.insert(0, len(self.case["context_ids"]))
        feeds = Feeds(self.processed_tokens, ends)
        with recorded(self.model, feeds.note):
            first = self._prefill(stack) if index == 0 else self._feed(len(self.ids))
            new_ids = self._decode(first, self.case["turns"][index]["max_new_tokens"])
        return self._record(new_ids, feeds)

    def _prefill(self, stack: contextlib.ExitStack) -> int:
        """Process the first prompt and compress it; returns the first token of the answer."""
        whole = self.case["protocol"] == "dense_question"
        pressed = len(self.ids) if whole else len(self.case["context_ids"])
        press = make_press(self.arm, pressed)
        if self.arm["evicts"] == "prefill":
            with press(self.model):
                token = self._feed(pressed)
            self._check_kept(pressed)
        else:
            token = self._feed(pressed)
            if press is not None:
                stack.enter_context(press(self.model))
        return token if whole else self._feed(len(self.ids))

    def _check_kept(self, prompt_tokens: int) -> None:
        """Hold the press to the size it was asked for, on every layer."""
        wanted = min(self.arm["kept_tokens"], prompt_tokens)
        kept = [self.cache.get_seq_length(layer) for layer in range(len(self.cache))]
        if any(length != wanted for length in kept):
            raise RuntimeError(f"the press kept {kept} tokens per layer, asked for {wanted}")

    def _feed(self, end: int) -> int:
        """Feed the ids up to `end` that are not processed yet; returns the most probable next."""
        import torch

        start, device = self.processed_tokens, self.model.device
        ids = torch.tensor([self.ids[start:end]], device=device)
        positions = torch.arange(start, end, device=device)[None]
        with torch.no_grad():
            output = self.model(ids, position_ids=positions, logits_to_keep=1, **self.given_cache)
        self.processed_tokens = end
        return int(output.logits[0, -1].argmax())

    def _decode(self, token: int, max_new_tokens: int) -> list[int]:
        new_ids = [token]
        self.ids.append(token)
        while token not in self.case["stop_ids"] and len(new_ids) < max_new_tokens:
            token = self._feed(len(self.ids))
            new_ids.append(token)
            self.ids.append(token)
        return new_ids

    def _record(self, new_ids: list[int], feeds: Feeds) -> dict[str, Any]:
        now, began = time.perf_counter(), feeds.first_step_seconds
        return {
            "output_ids": new_ids,
            "prompt_tokens": feeds.prompt_tokens,
            "new_prompt_tokens": feeds.prompt_tokens - feeds.first_index,
            "fed_tokens": feeds.fed_tokens,
            "fed_again_tokens": feeds.fed_again_tokens,
            "wrong_positions": feeds.wrong_positions,
            "read_tokens": feeds.read_tokens,
            "kept_tokens": cache_tokens(self.cache),
            "decode_seconds": 0.0 if began is None else now - began,
        }


@contextlib.contextmanager
def recorded(model: Any, note: Callable[[list[int], float], None]) -> Iterator[None]:
    """Report the positions of every pass of the model, and what its cache held before."""

    def before_pass(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        positions = keywords.get("position_ids")
        if positions is None:
            # Releases of transformers that derive the positions pass where the cache ends.
            positions = keywords["cache_position"][None]
        note(positions[0].tolist(), cache_tokens(keywords[cache_keyword(module)]))

    handle = model.model.register_forward_pre_hook(before_pass, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def play(model: Any, plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every arm of a plan on every case it is meant for, one record each."""
    for arm in plan["arms"]:
        for case in (case for case in plan["cases"] if case["name"] in arm["cases"]):
            turns = Conversation(model, arm, case).play()
            yield {"arm": arm["name"], "case": case["name"], "turns": turns}


def load(plan: dict[str, Any]) -> Any:
    """The plan's model in eval mode on its device."""
    import torch
    import transformers

    torch.set_num_threads(plan["threads"])
    loader: Any = transformers.AutoModelForCausalLM
    return loader.from_pretrained(plan["model"], dtype=plan["dtype"]).eval().to(plan["device"])


def main(arguments: list[str]) -> None:
    """Command line; see the module text."""
    if arguments == ["versions"]:
        print(json.dumps(versions()))
        return
    _, plan_path, results_path = arguments
    plan = json.loads(Path(plan_path).read_text(encoding="utf-8"))
    with Path(results_path).open("w", encoding="utf-8") as results:
        for record in play(load(plan), plan):
            results.write(json.dumps(record) + "\n")
            results.flush()
            print(f"played {record['arm']} {record['case']}", flush=True)
        results.write(json.dumps({"done": True}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
