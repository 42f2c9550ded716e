"""Text in pictures: each character by a font that has it, or escaped where no font here does."""

from __future__ import annotations

import functools
import logging
import unicodedata
from collections.abc import Iterator

from attrs import frozen
from distill_runtime import printable
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

_log = logging.getLogger(__name__)

FALLBACKS = (
    "NotoSans-Regular.ttf", "DejaVuSans.ttf", "NotoSansArabic-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf", "NotoSansHebrew-Regular.ttf", "NotoSansThai-Regular.ttf",
    "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf", "DroidSansFallback.ttf", "Arial Unicode.ttf", "PingFang.ttc",
    "Hiragino Sans GB.ttc", "msyh.ttc", "NotoEmoji-Regular.ttf", "Symbola.ttf", "Symbola_hint.ttf",
    "Apple Symbols.ttf", "seguiemj.ttf",
)  # fmt: skip
"""Files that systems have fonts of many scripts in; those that are here follow Pillow's own font,
which is Latin."""
_NO_CHARACTER = "\uffff"
_INVISIBLE = ("Zs", "Mn", "Me", "Cf", "Sk")
"""Categories of characters that stand for nothing by themselves: spaces, marks, joiners."""


@frozen
class Lettering:
    """Fonts of one size, in pixels."""

    size: int

    def length(self, text: str) -> int:
        """Return how wide one line of ``text`` is."""
        return sum(int(font.getlength(part)) + 1 for font, part in self._parts(text))

    def draw(
        self, pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, ink: tuple[int, int, int]
    ) -> None:
        """Draw one line, whose left upper corner is at ``place``."""
        x, y = place
        baseline = y + _own_font(self.size).getmetrics()[0]
        for font, part in self._parts(text):
            pen.text((x, baseline), part, ink, font, anchor="ls")
            x += int(font.getlength(part)) + 1

    def wrap(self, text: str, width: int) -> list[str]:
        """Break ``text`` at spaces into lines no wider than ``width``, and words that are longer
        anywhere: some scripts have no spaces.

        What a terminal would act on is escaped, as in messages.
        """
        lines: list[str] = []
        for word in printable(text).split():
            longer = f"{lines[-1]} {word}" if lines else word
            if lines and self.length(longer) <= width:
                lines[-1] = longer
                continue
            if self.length(word) <= width:
                lines.append(word)
                continue
            lines.append("")
            for character in word:
                if lines[-1] and self.length(lines[-1] + character) > width:
                    lines.append("")
                lines[-1] += character
        return lines or [""]

    def _parts(self, text: str) -> Iterator[tuple[FreeTypeFont, str]]:
        """Divide a line into parts of one font each."""
        own, part = _own_font(self.size), ""
        font = own
        for character in text:
            found = _find_font(self.size, character, font)
            shown = character if found is not None else _escape(character)
            if (part and found not in (None, font)) or (part and found is None and font is not own):
                yield font, part
                part = ""
            font = found or own
            part += shown
        if part:
            yield font, part


@functools.cache
def _own_font(size: int) -> FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, FreeTypeFont), "Pillow without FreeType has no font of any size"
    return font


@functools.cache
def _fallback_fonts(size: int) -> tuple[FreeTypeFont, ...]:
    fonts = []
    for name in FALLBACKS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:  # not on this machine
            continue
    return tuple(fonts)


@functools.lru_cache(maxsize=1 << 14)
def _find_font(size: int, character: str, current: FreeTypeFont) -> FreeTypeFont | None:
    """Return the font of a character; that of the one before it where the character is no letter of
    its own. None: no font here has it."""
    own = _own_font(size)
    if unicodedata.category(character) in _INVISIBLE:
        return current
    if _has_glyph(own, character):
        return own
    return next((font for font in _fallback_fonts(size) if _has_glyph(font, character)), None)


def _has_glyph(font: FreeTypeFont, character: str) -> bool:
    # Pillow does not say it: a font draws the same for all that it does not have.
    return _bitmap(font, character) != _bitmap(font, _NO_CHARACTER)


def _bitmap(font: FreeTypeFont, character: str) -> bytes:
    side = 2 * int(font.size)
    picture = Image.new("L", (side, side))
    ImageDraw.Draw(picture).text((side // 4, side // 4), character, 255, font)
    return picture.tobytes()


def _escape(character: str) -> str:
    _say_that_fonts_lack()
    code = ord(character)
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


@functools.cache
def _say_that_fonts_lack() -> None:
    _log.info(
        "no font on this machine has some characters of the captions, so pictures show their "
        "numbers (\\u...); fonts such as Noto Sans CJK, Noto Sans Arabic and Noto Emoji have them"
    )
