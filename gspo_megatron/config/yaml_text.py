"""YAML as recipes have it: YAML 1.2 without tags and merge keys, and every scalar stays the text that was written.

What a scalar is (number, true, null, text) is decided by the type of its key, in `field_rules`. So `yes`, `010` and
`4:00:00` are nothing but text here. PyYAML scans and parses; what it would make of the scalars (YAML 1.1) is not used.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml import events
from yaml.reader import Reader

from gspo_megatron.config.refusal import key_text, quote, refuse

_MOST_BYTES = 1 << 20
_MOST_VALUES = 20_000
"""Values of one text, those repeated by aliases included: nested aliases grow exponentially."""
_DEEPEST = 32
_LINE_END = re.compile("\r\n|\r|\n")
_UNREADABLE = Reader.NON_PRINTABLE
# YAML 1.1 ends a line at these, YAML 1.2 does not: the parser would fold them into a blank or a line feed.
_OTHER_LINE_ENDS = re.compile("[\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_ESCAPE = re.compile(r"\\(\r\n|.)", re.DOTALL)
_PLAIN_ESCAPES = frozenset('nt"\\/ xuU\r\n') | {"\r\n"}
# Commands of LaTeX that begin like the escapes for a tab and a line feed, without their first letter.
_LATEX = re.compile(
    r"(?:\\t(?:ext|extbf|extit|extrm|exttt|heta|imes|au|an|anh|frac|o|op|riangle|ilde|herefore)"
    r"|\\n(?:eq|e|eg|u|abla|ot|otin|eqq|leq|geq|mid|ewline|oindent|onumber))(?![A-Za-z])"
)
_SINGLE_QUOTES = "write the text in single quotes, in which a backslash is a backslash"


class Scalar(str):
    """A scalar as it was written.

    Attributes:
        plain: written without quotes, so that `null` means null and an option of no type may be a number.
        where: `file:line`; empty for an override.
        cut: a comment follows that may have been part of the text: `/data/set #1.jsonl`.
    """

    def __new__(cls, text: str, plain: bool = True, where: str = "", cut: bool = False) -> Scalar:
        """Make a scalar; see the attributes."""
        made = super().__new__(cls, text)
        made.plain, made.where, made.cut = plain, where, cut
        return made

    plain: bool
    where: str
    cut: bool


def read_yaml_file(path: Path, by_hand: bool = True) -> Any:
    """Read a file into dicts, lists and `Scalar`s; None when it is empty.

    Args:
        path: UTF-8, with or without a byte order mark.
        by_hand: refuse what a person writes by mistake (`"\\boxed{}"`). False for files that `save_resolved` wrote.

    Raises:
        RecipeError: a file that is not YAML, with its line.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise refuse("recipe-unreadable", "recipe", f"{quote(str(path))}: {error}", "name a readable file") from None
    if len(data) > _MOST_BYTES:
        raise refuse("recipe-unreadable", "recipe", f"{path} has {len(data)} bytes", "name a recipe: at most 1 MiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + len(_LINE_END.findall(data[: error.start].decode("latin-1")))
        message = f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8"
        raise refuse("recipe-unreadable", "recipe", message, "save the file as UTF-8") from None
    return _Builder(text, str(path), "recipe-unreadable", (), by_hand).document()


def read_yaml_value(text: str, key: tuple[str, ...]) -> Any:
    """Read the list or mapping of an override. Raises RecipeError naming the key."""
    return _Builder(text, "", "override-form", key, by_hand=True).document()


class _Builder:
    """Builds the values of one text from the parser's events."""

    def __init__(self, text: str, place: str, code: str, key: tuple[str, ...], by_hand: bool) -> None:
        self.text, self.place, self.code, self.root, self.by_hand = text, place, code, key, by_hand
        self.count = 0
        # The value of each anchor and how many values it holds; None while it is being built.
        self.anchors: dict[str, tuple[Any, int] | None] = {}
        self.check_characters(_UNREADABLE)
        if by_hand:
            self.check_characters(_OTHER_LINE_ENDS)
        self.parser = yaml.SafeLoader(text)

    def refuse(self, key: tuple[str, ...], line: int, message: str, fix: str) -> NoReturn:
        place = f"{self.place}:{line + 1}: " if self.place else ""
        raise refuse(self.code, key_text(key) or "recipe", place + message, fix)

    def check_characters(self, wrong: re.Pattern[str]) -> None:
        found = wrong.search(self.text)
        if found:
            line = len(_LINE_END.findall(self.text[: found.start()]))
            message = f"holds the character U+{ord(found[0]):04X}"
            self.refuse(self.root, line, message, "save the file as UTF-8 text and write the character as an escape")

    def next(self) -> Any:
        try:
            return self.parser.get_event()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = _CONTROL.sub("?", error.problem or error.context or "is not YAML")
            fix = "correct the line, and write text with special characters in single quotes"
            if "escape" in problem:
                fix = _SINGLE_QUOTES
            elif r"'\t'" in problem:
                problem, fix = "a tab indents or separates", "use blanks"
            self.refuse(self.root, mark.line if mark else 0, problem, fix)
        # PyYAML lets the numbers of \U and of %YAML through unchecked.
        except (yaml.YAMLError, ValueError, OverflowError):
            self.refuse(self.root, self.parser.line, "an escape or directive has a wrong number", _SINGLE_QUOTES)

    def document(self) -> Any:
        self.next()
        if isinstance(self.next(), events.StreamEndEvent):
            return None
        value = self.value(self.next(), self.root)
        self.next()
        after = self.next()
        if not isinstance(after, events.StreamEndEvent):
            self.refuse(self.root, after.start_mark.line, "begins a second document", "keep one document in a file")
        return value

    def value(self, event: Any, key: tuple[str, ...]) -> Any:
        line = event.start_mark.line
        self.count += 1
        if len(key) - len(self.root) > _DEEPEST:
            self.refuse(self.root, line, f"is nested too deep: more than {_DEEPEST} levels", "write it flatter")
        if isinstance(event, events.AliasEvent):
            return self.alias(event, key)
        if event.tag is not None:
            self.refuse(key, line, f"has the tag {quote(event.tag)}", "leave the tag out; the key decides the type")
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        before = self.count
        if isinstance(event, events.ScalarEvent):
            value = self.scalar(event, key)
        elif isinstance(event, events.SequenceStartEvent):
            value = self.sequence(key)
        else:
            value = self.mapping(key)
        if event.anchor is not None:
            self.anchors[event.anchor] = (value, 1 + self.count - before)
        return value

    def alias(self, event: Any, key: tuple[str, ...]) -> Any:
        line, name = event.start_mark.line, quote(event.anchor)
        if event.anchor not in self.anchors:
            self.refuse(key, line, f"the alias {name} has no anchor before it", "quote text that begins with *")
        found = self.anchors[event.anchor]
        if found is None:
            self.refuse(key, line, f"the anchor {name} holds itself", "write the value out")
        self.count += found[1]
        if self.count > _MOST_VALUES:
            self.refuse(key, line, f"aliases repeat more than {_MOST_VALUES} values", "write the values out")
        return found[0]

    def sequence(self, key: tuple[str, ...]) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := self.next(), events.SequenceEndEvent):
            items.append(self.value(event, (*key, str(len(items)))))
        return items

    def mapping(self, key: tuple[str, ...]) -> dict[str, Any]:
        items: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := self.next(), events.MappingEndEvent):
            line = event.start_mark.line
            if not isinstance(event, events.ScalarEvent):
                self.refuse(key, line, "has a key that is no text", "write the keys as words")
            name = self.value(event, (*key, event.value))
            if name.plain and name == "<<":
                self.refuse(key, line, "merges with <<, which YAML 1.2 does not have", "write the keys out")
            if _CONTROL.search(name):
                self.refuse(key, line, f"has the key {quote(str(name))}", "leave control characters out of keys")
            if name in items:
                message = f"is written twice, first in line {lines[name] + 1}"
                self.refuse((*key, name), line, message, "keep one of them")
            lines[name] = line
            items[str(name)] = self.value(self.next(), (*key, name))
        return items

    def scalar(self, event: events.ScalarEvent, key: tuple[str, ...]) -> Scalar:
        start, end = event.start_mark, event.end_mark
        assert start is not None and end is not None
        if event.style == '"' and self.by_hand:
            written = self.text[start.index : end.index]
            escape = next((e[0] for e in _ESCAPE.finditer(written) if e[1] not in _PLAIN_ESCAPES), None)
            if escape is None:
                # An escaped backslash is not the start of a command.
                found = _LATEX.search(written.replace("\\\\", "  "))
                escape = found and found[0]
            if escape:
                message = f"{quote(str(event.value))}: {escape} in double quotes is one character, not a backslash"
                self.refuse(key, start.line, message, _SINGLE_QUOTES)
        plain = event.style is None
        cut = plain and re.match(r"[ \t]+#\S", self.text[end.index : end.index + 1000]) is not None
        return Scalar(str(event.value), plain, f"{self.place}:{start.line + 1}" if self.place else "", cut)
