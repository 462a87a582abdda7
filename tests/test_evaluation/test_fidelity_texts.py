"""Where windows come from: files, the standard library, generated logs; any tokenizer."""

from __future__ import annotations

import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from sfi_agent import Engine, InputError, TemplateError
from sfi_agent.embedded import make_case
from sfi_agent.evaluation.fidelity import (
    Window,
    WindowReader,
    WindowSizes,
    file_windows,
    log_windows,
    standard_library_windows,
)
from tests.families import Family, build_model
from tests.tiny_tokenizers import byte_tokenizer, chatml_tokenizer

SIZES = WindowSizes(prompt_tokens=50, continuation_tokens=10, samples=3)


@lru_cache
def model() -> Any:
    return build_model(Family("small", "Llama", {"vocab_size": 600}))


def engine(tokenizer: Any = None) -> Engine:
    return Engine(model(), tokenizer if tokenizer is not None else chatml_tokenizer())


def with_bos(tokenizer: Any) -> Any:
    """The tokenizer made to put a token in front of every text, as Llama's and Gemma's do."""
    from tokenizers.processors import TemplateProcessing

    bos = "<|endoftext|>"
    number = tokenizer.convert_tokens_to_ids(bos)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, number)]
    )
    return tokenizer


def text_of(window: Window, tokenizer: Any) -> str:
    return str(tokenizer.decode([*window.prompt_ids, *window.text_ids]))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("".join(f"line {n} says {n * n}.\n" for n in range(400)), encoding="utf-8")
    return path


# ---------------------------------------------------------------- files


def test_windows_of_a_file_are_its_text_spread_over_it(file: Path) -> None:
    tokenizer = chatml_tokenizer()
    found = file_windows(engine(tokenizer), file, SIZES)
    text = file.read_text()
    starts = []
    for window in found:
        assert (len(window.prompt_ids), len(window.text_ids)) == (50, 10)
        piece = text_of(window, tokenizer)
        starts.append(text.index(piece))
        assert window.origin == f"notes.txt, character {starts[-1]:,}"
        assert piece.startswith("line "), "begins with a line"
    assert starts[0] == 0
    assert starts[1] == pytest.approx(len(text) / 2, rel=0.1)
    assert len(text) - starts[2] < len(text) / 10
    assert found == file_windows(engine(tokenizer), file, SIZES)


def test_a_window_is_what_tokenizing_the_whole_text_gives(file: Path) -> None:
    """Only a slice is tokenized; its end must not show."""
    tokenizer = chatml_tokenizer()
    window = file_windows(engine(tokenizer), file, WindowSizes(500, 100, 1))[0]
    whole = tokenizer.encode(file.read_text(), add_special_tokens=False)
    assert [*window.prompt_ids, *window.text_ids] == whole[:600]


def test_what_the_tokenizer_puts_in_front_of_a_text_is_put_in_front_of_a_window(
    file: Path,
) -> None:
    tokenizer = with_bos(byte_tokenizer())
    bos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    for window in file_windows(engine(tokenizer), file, SIZES):
        assert window.prompt_ids[0] == bos and bos not in window.prompt_ids[1:]
        assert (len(window.prompt_ids), len(window.text_ids)) == (50, 10)


def test_a_text_of_one_line_and_other_scripts(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("".join(f"żółć {n} 東京 🙂 " for n in range(300)), encoding="utf-8")
    found = file_windows(engine(byte_tokenizer()), path, SIZES)
    assert len({window.prompt_ids for window in found}) == SIZES.samples
    assert all(len(window.prompt_ids) == 50 for window in found)


def test_a_text_just_long_enough(tmp_path: Path) -> None:
    path = tmp_path / "exact.txt"
    path.write_text("x" * 60)
    found = file_windows(engine(byte_tokenizer()), path, WindowSizes(50, 10, 1))
    assert len(found[0].text_ids) == 10
    path.write_text("x" * 59)
    with pytest.raises(InputError, match=r"got 59 tokens; allowed: at least 60 tokens \(50 of"):
        file_windows(engine(byte_tokenizer()), path, WindowSizes(50, 10, 1))
    # Refused before a billion places are looked at.
    path.write_text("x" * 70)
    with pytest.raises(InputError, match=r"room for \d different windows"):
        file_windows(engine(byte_tokenizer()), path, WindowSizes(50, 10, 10**9))
    path.write_text("x" * 61)
    with pytest.raises(InputError, match="room for . different windows"):
        file_windows(engine(byte_tokenizer()), path, WindowSizes(50, 10, 3))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (b" \n\t\n", "an empty file"),
        (b"plain \xff\xfe text", "bytes that are not UTF-8 at 6"),
        (b"abc\0def", "zero bytes"),
        (b"too short", "allowed: at least 60 tokens"),
    ],
)
def test_files_that_do_not_serve_are_named(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        file_windows(engine(), path, SIZES)
    assert "bad.txt" in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(InputError, match=path.name):
            file_windows(engine(), path, SIZES)


# ---------------------------------------------------------------- the standard library


def test_modules_follow_from_the_seed() -> None:
    tokenizer = chatml_tokenizer()
    found = standard_library_windows(engine(tokenizer), SIZES, seed=1)
    assert found == standard_library_windows(engine(tokenizer), SIZES, seed=1)
    assert found != standard_library_windows(engine(tokenizer), SIZES, seed=2)
    folder = Path(sysconfig.get_paths()["stdlib"])
    assert len({window.origin for window in found}) == SIZES.samples
    for window in found:
        path = folder / window.origin
        assert text_of(window, tokenizer).startswith(f"# {path.name}\n")
        assert path.read_text(encoding="utf-8")[:40] in text_of(window, tokenizer)


def sources_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})


def test_a_window_longer_than_a_module_goes_on_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.py").write_text(f"{name} = 1\n" * 600)
    (tmp_path / "short.py").write_text("short = 1\n")
    (tmp_path / "_private.py").write_text("private = 1\n" * 600)
    sources_in(tmp_path, monkeypatch)
    (window,) = standard_library_windows(engine(byte_tokenizer()), WindowSizes(8000, 10, 1))
    names = window.origin.split(", ")
    assert len(names) == 2 and len(window.prompt_ids) == 8000
    assert set(names) < {"one.py", "two.py", "three.py"}
    text = text_of(window, byte_tokenizer())
    assert all(f"# {name}\n{name.removesuffix('.py')} = 1\n" in text for name in names)


def test_modules_long_enough_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(20):
        (tmp_path / f"module{index}.py").write_text("x = 1\n" * 700)
    (tmp_path / "large.py").write_text("x = 1\n" * 7000)
    sources_in(tmp_path, monkeypatch)
    (window,) = standard_library_windows(engine(byte_tokenizer()), WindowSizes(9000, 10, 1))
    assert window.origin == "large.py"


def test_an_installation_without_sources_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources_in(tmp_path, monkeypatch)
    with pytest.raises(InputError, match="without its sources"):
        standard_library_windows(engine(), SIZES)


# ---------------------------------------------------------------- logs


def test_logs_are_turns_of_a_chat() -> None:
    tokenizer = chatml_tokenizer()
    sizes = WindowSizes(1200, 400, 2)
    found = log_windows(engine(tokenizer), sizes, seed=3)
    assert found == log_windows(engine(tokenizer), sizes, seed=3)
    assert found != log_windows(engine(tokenizer), sizes, seed=4)
    assert [window.origin.split(", ")[1] for window in found] == ["easy", "hard"]
    for window in found:
        prompt = str(tokenizer.decode(window.prompt_ids))
        answer = str(tokenizer.decode(window.text_ids))
        assert prompt.startswith("<|im_start|>system") and prompt.endswith("assistant\n")
        assert 1200 * 0.8 < len(window.prompt_ids) < 1200 * 1.5
        assert answer.endswith("<|im_end|>"), "up to the end of the turn and no further"


def test_logs_without_a_template_are_plain_text() -> None:
    tokenizer = byte_tokenizer()
    (window,) = log_windows(engine(tokenizer), WindowSizes(4000, 9, 1))
    prompt = str(tokenizer.decode(window.prompt_ids))
    assert prompt.endswith("\n\nAnswer:") and len(window.text_ids) == 9
    case = make_case(400_000, log_tokens=4000, count=len)
    assert f" {case.expected}".startswith(str(tokenizer.decode(window.text_ids)))


def test_a_template_without_system_messages() -> None:
    template = (
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = chatml_tokenizer(template)
    (window,) = log_windows(engine(tokenizer), WindowSizes(1200, 20, 1))
    assert str(tokenizer.decode(window.prompt_ids)).startswith("<user>")


def test_a_template_that_renders_nothing_is_named() -> None:
    tokenizer = chatml_tokenizer("{{ raise_exception('never') }}")
    with pytest.raises(TemplateError, match="never"):
        log_windows(engine(tokenizer), WindowSizes(1200, 20, 1))


# ---------------------------------------------------------------- common


@pytest.mark.parametrize("source", [log_windows, standard_library_windows])
def test_a_checkpoint_without_a_tokenizer_is_named(source: Any, tmp_path: Path) -> None:
    bare = Engine(model())
    for call in (lambda: source(bare, SIZES), lambda: file_windows(bare, tmp_path, SIZES)):
        with pytest.raises(InputError, match="LlamaForCausalLM without a tokenizer"):
            call()


@pytest.mark.parametrize("name", ["prompt_tokens", "continuation_tokens", "samples"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_sizes_are_checked(name: str, value: Any) -> None:
    given = {"prompt_tokens": 5, "continuation_tokens": 5, "samples": 5, name: value}
    with pytest.raises(InputError, match=f"{name}="):
        WindowSizes(**given)


def test_a_huge_text_is_not_tokenized_as_a_whole() -> None:
    tokenizer = chatml_tokenizer()
    lengths: list[int] = []
    original = tokenizer.encode

    def counting(text: str, **options: Any) -> Any:
        lengths.append(len(text))
        return original(text, **options)

    tokenizer.encode = counting
    text = "a sentence of some words.\n" * 100_000
    reader = WindowReader(tokenizer, SIZES)
    last = reader.last_start(text)
    assert last is not None and last > len(text) * 0.99
    assert reader.window(text, last // 2, "middle") is not None
    assert max(lengths) < 2000
