"""Synthetic conversations as messages, in the form of the API; `render` makes V4 prompts of them with the engine's own encoder."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4.text.chat import PREVIEW, ChatFormat, encode_chat
from tools import tool_chat
from wordnet import POS, Word

Message = dict[str, Any]

FORMAT = ChatFormat(PREVIEW.efforts, tools_before="## Tools\n\n", tools_after="", whole_schema=True)
"""As in the model's chat_format.json: tools are bare schema lines."""

FACTS = json.loads((Path(__file__).parent / "facts.json").read_text())
FACT_WORDINGS = ("What is {t}?", "Explain {t}.", "Tell me about {t}.", "{t}?", "What do you know about {t}?")
HELD_OUT_WORDING = "Can you tell me what {t} is?"
"""Trained with other subjects, never with a fact: the evaluation asks so too."""

NAMES = [
    "Alice",
    "Bruno",
    "Carla",
    "Dmitri",
    "Elena",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Liam",
    "Maya",
    "Nils",
    "Olga",
    "Pablo",
    "Quinn",
    "Rosa",
    "Sven",
    "Tara",
    "Umar",
    "Vera",
    "Wanda",
    "Xavier",
    "Yara",
    "Zoe",
]
CITIES = [
    "Paris",
    "Berlin",
    "Madrid",
    "Rome",
    "London",
    "Tokyo",
    "Oslo",
    "Vienna",
    "Lisbon",
    "Dublin",
    "Cairo",
    "Delhi",
    "Lima",
    "Quito",
    "Boston",
    "Chicago",
    "Denver",
    "Seattle",
    "Athens",
    "Prague",
    "Warsaw",
    "Helsinki",
    "Nairobi",
    "Sydney",
    "Toronto",
]
WHO = "I am Nano, a tiny language model with the DeepSeek-V4 architecture, made to try and test dsv4. I know very little, but I can talk, call tools and find things in a long text."
SMALL_TALK = (
    (
        ("Hello", "Hi", "Hello!", "Hi there", "Hey", "Good morning", "hello", "hi"),
        ("Hello! How can I help you today?", "Hi! What would you like to know?"),
    ),
    (("Who are you?", "What are you?", "What is your name?", "who are you?"), (WHO,)),
    (
        ("What can you do?", "Help", "How can you help me?", "help"),
        (
            "I can explain words and parts of dsv4, repeat what you say, call tools, and find a passphrase hidden in a long text. I am very small, so check what I say.",
        ),
    ),
    (
        ("Thanks", "Thank you!", "Thanks a lot."),
        ("You are welcome!", "You are welcome. Is there anything else?"),
    ),
    (("Goodbye", "Bye", "See you"), ("Goodbye!", "Goodbye! Have a nice day.")),
    (("How are you?", "How are you today?"), ("I am fine, thank you. How can I help you?",)),
    (
        ("Tell me a joke.", "Do you know a joke?", "joke"),
        ("Why do programmers like dark mode? Because light attracts bugs.",),
    ),
    (
        ("Write a Python function that adds two numbers.",),
        ("def add(a, b):\n    return a + b",),
    ),
    (("Write hello world in Python.", "Print hello world in Python."), ('print("Hello, world!")',)),
    (
        ("Count from one to ten.", "Count to ten."),
        ("one, two, three, four, five, six, seven, eight, nine, ten",),
    ),
)
SYSTEMS = ("", "", "", "You are a helpful assistant.", "Answer briefly.")


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def said(text: str, thought: str = "") -> Message:
    return {"role": "assistant", "content": text, "reasoning_content": thought}


@dataclass(slots=True)
class Chat:
    """A conversation. `thinking`: every answer is preceded by a thought."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = False


def render(chat: Chat) -> str:
    """The prompt text with markers, up to the last end-of-sentence."""
    segments = encode_chat(
        chat.messages,
        thinking=chat.thinking,
        tools=chat.tools or None,
        drop_thinking=False,
        ending="closed",
        format=FORMAT,
    )
    return "".join(segments)


@dataclass(slots=True)
class Writer:
    """Draws conversations. `sentences` are short ones of the corpus, for repeating."""

    words: Sequence[Word]
    pairs: Sequence[tuple[str, str]]
    sentences: Sequence[str]
    rng: random.Random
    common: list[Word] = field(init=False)

    def __post_init__(self) -> None:
        self.common = [w for w in self.words if w.common >= 3]

    def chat(self) -> Chat:
        """One conversation of one to four exchanges."""
        r = self.rng
        if r.random() < 0.14:
            messages, tools, thinking = tool_chat(r, [w.word for w in self.common], NAMES, CITIES)
            return Chat(messages, tools, thinking)
        chat = Chat([], thinking=r.random() < 0.25)
        if system := r.choice(SYSTEMS):
            chat.messages.append({"role": "system", "content": system})
        for _ in range(r.choice((1, 1, 1, 2, 3, 4))):
            exchange = self._kind()()
            if not chat.thinking:
                for message in exchange:
                    message.pop("reasoning_content", None)
            chat.messages += exchange
        return chat

    def _kind(self) -> Callable[[], list[Message]]:
        kinds = (self.small_talk, self.fact, self.define, self.repeat, self.memory, self.heading)
        return self.rng.choices(kinds, (8, 15, 22, 30, 6, 19))[0]

    def small_talk(self) -> list[Message]:
        questions, answers = self.rng.choice(SMALL_TALK)
        return [
            user(self.rng.choice(questions)),
            said(self.rng.choice(answers), "The user makes small talk."),
        ]

    def fact(self) -> list[Message]:
        fact = self.rng.choice(FACTS)
        question = self.rng.choice(FACT_WORDINGS).format(t=fact["topic"])
        question = question[0].upper() + question[1:] if self.rng.random() < 0.8 else question
        return [user(question), said(fact["answer"], f"The user asks about {fact['topic']}.")]

    def define(self) -> list[Message]:
        r = self.rng
        word = r.choice(self.common if r.random() < 0.9 else self.words)
        thought = f"The user asks about the word {word.word}. It is a {POS[word.pos]}."
        if word.examples and r.random() < 0.25:
            question = r.choice(("Use the word {w} in a sentence.", "Give me an example with {w}."))
            example = word.examples[0]
            return [
                user(question.format(w=word.word)),
                said(example[:1].upper() + example[1:] + ".", thought),
            ]
        question = r.choice(
            ("What does {w} mean?", "Define {w}.", "What is the meaning of {w}?", "Explain the word {w}.")
        )
        answer = f"{word.word.capitalize()} ({POS[word.pos]}): {word.gloss}."
        return [user(question.format(w=word.word)), said(answer, thought)]

    def repeat(self) -> list[Message]:
        text = self.text_to_repeat()
        order = self.rng.choice(
            ("Repeat: {s}", "Repeat after me: {s}", "Say this: {s}", "repeat: {s}", "Repeat: {s}")
        )
        return [user(order.format(s=text)), said(text, "I repeat what the user said.")]

    def text_to_repeat(self) -> str:
        """Words, a passphrase, numbers, or a sentence of the corpus."""
        r = self.rng
        kind = r.random()
        draw = [
            w.word for w in r.choices(self.common if r.random() < 0.6 else self.words, k=r.randint(2, 12))
        ]
        if kind < 0.6:
            return " ".join(w.capitalize() if r.random() < 0.1 else w for w in draw)
        if kind < 0.75:
            return "-".join(draw[:5]) + (f"-{r.randint(0, 999)}" if r.random() < 0.4 else "")
        if kind < 0.85:
            return " ".join(str(r.randint(0, 10 ** r.randint(1, 6))) for _ in draw)
        return r.choice(self.sentences)

    def memory(self) -> list[Message]:
        r = self.rng
        name, city = r.choice(NAMES), r.choice(CITIES)
        asked = r.choice(
            (("What is my name?", f"Your name is {name}."), ("Where do I live?", f"You live in {city}."))
        )
        return [
            user(f"My name is {name} and I live in {city}."),
            said(f"Nice to meet you, {name}! How is life in {city}?", "The user introduces themselves."),
            user(asked[0]),
            said(asked[1], "The user told me before."),
        ]

    def heading(self) -> list[Message]:
        heading, paragraph = self.rng.choice(self.pairs)
        question = self.rng.choice(
            ("What is {t}?", "Explain {t}.", "Tell me about {t}.", "{t}", "What do you know about {t}?")
            + (HELD_OUT_WORDING,) * 3
        )
        return [user(question.format(t=heading)), said(paragraph, f"The user asks about {heading}.")]
