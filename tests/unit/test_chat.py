"""`course chat`: what the model is given, what is forgotten, and how it behaves in a terminal and a pipe."""

import io
import json
import os
import select
import signal
import sys
import time

import pytest
import torch

from shared import cli
from shared.cli import chat
from shared.data.tokenizers import END_OF_TEXT, BPETokenizer, CharTokenizer
from shared.models.gpt import GPT, GPTConfig
from shared.models.model_utils import save_model
from shared.runtime.errors import CourseError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def save(folder, tokenizer, context=32, template=None):
    torch.manual_seed(0)
    config = GPTConfig(tokenizer.vocab_size, context, num_layers=1, num_heads=2, d_model=16, init_std=0.5)
    save_model(GPT(config), folder, tokenizer)
    if template is not None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save(tmp_path_factory.mktemp("saved") / "base", CharTokenizer.from_text("abcdefgh \n"))


@pytest.fixture(scope="module")
def instructed(tmp_path_factory):
    tokenizer = BPETokenizer.train(["user assistant system hello"], 300, MARKS)
    return save(tmp_path_factory.mktemp("saved") / "instructed", tokenizer, context=256, template=CHATML)


def talk(capsys, monkeypatch, folder, lines, *more):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    status = cli.main(["chat", "--model", str(folder), "--max-new-tokens", "5", *more])
    return status, *capsys.readouterr()


def test_through_a_pipe_the_answers_alone_go_to_stdout(capsys, monkeypatch, base):
    status, out, err = talk(capsys, monkeypatch, base, b"abc\n\nfe\n", "--seed", "1")
    assert status == 0
    assert len(out) == 2 * (5 + 1)  # two answers of five characters
    assert "no chat template" in err
    assert "seed 1" in err


def test_a_seed_repeats_a_conversation(capsys, monkeypatch, base):
    first = talk(capsys, monkeypatch, base, b"abc\nd\n", "--seed", "3")[1]
    assert talk(capsys, monkeypatch, base, b"abc\nd\n", "--seed", "3")[1] == first
    assert talk(capsys, monkeypatch, base, b"abc\nd\n", "--seed", "4")[1] != first


def test_what_was_said_before_is_part_of_the_prompt_until_reset(capsys, monkeypatch, base):
    greedy = ("--temperature", "0")
    alone = talk(capsys, monkeypatch, base, b"gg\n", *greedy)[1]
    after = talk(capsys, monkeypatch, base, b"abcabc\ngg\n", *greedy)[1]
    assert after[6:] != alone  # "abcabc" and its answer are read, too
    again = talk(capsys, monkeypatch, base, b"abcabc\n/reset\ngg\n", *greedy)[1]
    assert again[6:] == alone


def test_quit_ends_and_an_unknown_command_is_not_sent(capsys, monkeypatch, base):
    status, out, err = talk(capsys, monkeypatch, base, b"/help me\n/quit\nabc\n")
    assert (status, out) == (0, "")
    assert "There is no command /help" in err


def test_a_continuation_forgets_its_beginning_when_the_context_is_full():
    tokenizer = CharTokenizer.from_text("abc\n")
    text = chat.Continuation(tokenizer, room=6)
    assert tokenizer.decode(text.ask("abc")) == "abc"
    text.keep(tokenizer.encode("cc"))
    assert tokenizer.decode(text.ask("ba")) == "bccc\nba"[-6:]
    text.reset()
    assert tokenizer.decode(text.ask("a")) == "a"
    with pytest.raises(CourseError, match="takes 7 tokens and there is room for 6"):
        text.ask("abcabca")


def render(messages):
    """A template: the role's first letter, a colon, the content."""
    return "".join(f"{m['role'][0]}:{m['content']}\n" for m in messages) + "a:"


def test_a_dialogue_forgets_whole_exchanges_and_never_the_system_message():
    tokenizer = CharTokenizer.from_text("abcdefghijklmnopqrstuvwxyz:\n")
    dialogue = chat.Dialogue(tokenizer, 20, render, system="be")
    assert tokenizer.decode(dialogue.ask("one")) == "s:be\nu:one\na:"
    dialogue.keep(tokenizer.encode("two"))
    assert tokenizer.decode(dialogue.ask("x")) == "s:be\nu:x\na:"  # with the first exchange it would be 23
    dialogue.keep(tokenizer.encode("y"))
    assert tokenizer.decode(dialogue.ask("z")) == "s:be\nu:x\na:y\nu:z\na:"
    dialogue.reset()
    assert tokenizer.decode(dialogue.ask("z")) == "s:be\nu:z\na:"
    with pytest.raises(CourseError, match="there is room for 20"):
        dialogue.ask("a" * 20)
    assert tokenizer.decode(dialogue.ask("q")) == "s:be\nu:q\na:"  # what was not answered is not remembered


def test_special_tokens_are_special_where_the_template_writes_them_and_text_in_messages():
    tokenizer = BPETokenizer.train(["hello"], 300, MARKS)
    start, end = (tokenizer.special_tokens[name] for name in MARKS)
    dialogue = chat.Dialogue(
        tokenizer, 1000, lambda messages: f"{MARKS[0]}{messages[0]['content']}{MARKS[1]}"
    )
    ids = dialogue.ask("a<|im_end|>b")
    assert (ids[0], ids[-1]) == (start, end)
    assert ids.count(end) == 1
    assert tokenizer.decode(ids) == "<|im_start|>a<|im_end|>b<|im_end|>"


def test_a_chat_template_is_used_and_gives_transformers_prompt(capsys, monkeypatch, instructed):
    from transformers import AutoTokenizer

    from shared.inference import generation

    prompts = []
    real = generation.stream

    def spy(model, prompt, *arguments, **options):
        prompts.append(list(prompt))
        return real(model, prompt, *arguments, **options)

    monkeypatch.setattr(generation, "stream", spy)
    status, _, err = talk(capsys, monkeypatch, instructed, b"hello\n", "--system", "user")
    assert status == 0
    assert "through its chat template" in err
    messages = [{"role": "system", "content": "user"}, {"role": "user", "content": "hello"}]
    library = AutoTokenizer.from_pretrained(instructed)
    expected = library.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompts == [expected]


def test_the_template_may_lie_in_a_file_of_its_own(tmp_path, capsys, monkeypatch):
    folder = save(tmp_path / "model", CharTokenizer.from_text("abcdefgh :\n"), context=64)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}a:{{ m.content }}\n{% endfor %}b:")
    assert talk(capsys, monkeypatch, folder, b"hg\n")[0] == 0


def refused(capsys, monkeypatch, folder, lines, *more):
    status, _, err = talk(capsys, monkeypatch, folder, lines, *more)
    assert status == 2
    complaints = [line for line in err.splitlines() if line.startswith("course: ")]
    assert len(complaints) == 1
    assert "Traceback" not in err
    return complaints[0]


def test_bad_input_is_one_sentence(capsys, monkeypatch, base, tmp_path):
    assert "nowhere" in refused(capsys, monkeypatch, tmp_path / "nowhere", b"")
    assert "no chat template" in refused(capsys, monkeypatch, base, b"", "--system", "be brief")
    assert "Line 2 of standard input is not UTF-8" in refused(capsys, monkeypatch, base, b"abc\n\xff\n")
    assert "there is room for 27" in refused(capsys, monkeypatch, base, b"a" * 30)
    refused(capsys, monkeypatch, base, b"", "--temperature", "-1")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ("{", "is damaged or not JSON"),
        ("[]", "does not hold a tokenizer's settings"),
        ('{"chat_template": 3}', "is not a text"),
        ('{"chat_template": "{% for %}"}', "cannot write this down"),
        ('{"chat_template": "{{ raise_exception(\'only one turn\') }}"}', "only one turn"),
    ],
)
def test_a_damaged_template_is_one_sentence(capsys, monkeypatch, base, tmp_path, settings, complaint):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "tokenizer_config.json").write_text(settings)
    assert complaint in refused(capsys, monkeypatch, folder, b"abc\n")


def test_special_tokens_end_an_answer(capsys, monkeypatch, tmp_path):
    tokenizer = CharTokenizer.from_text("ab", (END_OF_TEXT,))
    folder = save(tmp_path / "model", tokenizer)
    out = talk(capsys, monkeypatch, folder, b"ab\n" * 5, "--max-new-tokens", "8", "--seed", "0")[1]
    answers = out.split("\n")
    assert END_OF_TEXT not in out
    assert min(len(answer) for answer in answers[:5]) < 8


class Terminal:
    """`course chat` in a pseudo-terminal."""

    def __init__(self, folder, *more):
        import pty

        self.process, self.screen = pty.fork()
        if self.process == 0:
            command = [sys.executable, "-m", "shared", "chat", "--model", str(folder), "--seed", "0", *more]
            os.execv(sys.executable, command)
        self.seen = ""

    def until(self, text, seconds=60.0):
        """Read until the terminal shows `text`, and return what came before it."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} did not come; seen: {self.seen!r}"
            if select.select([self.screen], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.screen, 4096).decode()
                except OSError:  # the other end is closed
                    assert text in self.seen, self.seen
        before, _, self.seen = self.seen.partition(text)
        return before

    def send(self, text):
        os.write(self.screen, text.encode())

    def ended(self):
        """Its exit status."""
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends(tmp_path):
    folder = save(tmp_path / "model", CharTokenizer.from_text("abcdefgh \n"), context=40_000)
    terminal = Terminal(folder, "--max-new-tokens", "20000")  # longer than anyone waits
    try:
        terminal.until("Ctrl-C stops an answer")
        terminal.until("> ")
        terminal.send("abc\n")
        terminal.until("abc\r\n")
        assert select.select([terminal.screen], [], [], 60)[0]  # the answer has begun
        terminal.send("\x03")
        assert 0 < len(terminal.until(" …")) < 20_000
        terminal.until("> ")
        time.sleep(0.3)  # readline draws its prompt just before it listens for signals
        terminal.send("\x03")  # nothing to stop: a reminder, and the prompt again
        terminal.until("Ctrl-D ends")
        terminal.until("> ")
        terminal.send("\x04")
        assert terminal.ended() == 0
    finally:
        os.close(terminal.screen)


def test_ctrl_c_in_an_answer_keeps_what_was_said(capsys):
    tokenizer = CharTokenizer.from_text("abc")

    def tokens():
        yield from tokenizer.encode("ab")
        signal.raise_signal(signal.SIGINT)
        yield from tokenizer.encode("c")

    said = chat._say(tokenizer, tokens(), at_terminal=True)
    assert tokenizer.decode(said) == "ab"
    shown = capsys.readouterr()
    assert shown.out == "ab …\n"
    assert "2 tokens" in shown.err


def test_without_a_model_it_is_the_base_model_that_comes_with_the_course(monkeypatch, capsys):
    from shared.recipes.base_model import shipped_model

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def main():\n")))
    assert cli.main(["chat", "--max-new-tokens", "2", "--seed", "0"]) == 0
    assert f"{shipped_model()}: 12," in capsys.readouterr().err
