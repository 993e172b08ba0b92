"""A headless Chromium with a camera that plays a film, for tests of the page. Not a test itself."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from training.scenes import BACKGROUNDS, COLORS, Scene, Shape, render

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page, Playwright

FRAMES_A_SECOND = 30  # at which Chromium plays MJPEG
SECONDS_A_SCENE = 2

_CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@dataclass(frozen=True)
class FilmScene:
    """What the camera sees for a while: large shapes, and what the demo model says of them in brief.

    Attributes:
        answer: the model's.
        background: its name.
        shapes: (kind, color, cell of a grid of 3×3) of each.
    """

    answer: str
    background: str
    shapes: tuple[tuple[str, str, int], ...]

    def draw(self) -> Image.Image:
        """640×480 pixels."""
        width, height = aspect = (1.0, 0.75)
        centers = {cell: ((cell % 3 + 0.5) / 3 * width, (cell // 3 + 0.5) / 3 * height) for cell in range(9)}
        shapes = [
            Shape(kind, color, "large", cell, centers[cell], 0.11, COLORS[color]) for kind, color, cell in self.shapes
        ]
        return render(Scene(tuple(shapes), BACKGROUNDS[self.background], aspect), 640)


FILM = (
    FilmScene(
        "A large red circle, a large green square and a large orange star.",
        "pale blue",
        (("circle", "red", 1), ("square", "green", 3), ("star", "orange", 8)),
    ),
    FilmScene(
        "A large blue square and a large orange triangle.",
        "pale pink",
        (("square", "blue", 3), ("triangle", "orange", 5)),
    ),
)


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)
    return file.getvalue()


def write_film(path: Path) -> None:
    """An MJPEG file of the scenes, one after another. Chromium plays it in a loop, from when a camera starts."""
    frames = [jpeg(scene.draw(), quality=90) for scene in FILM]
    path.write_bytes(b"".join(FRAMES_A_SECOND * SECONDS_A_SCENE * frame for frame in frames))


@contextmanager
def chromium(film: Path) -> Iterator[Browser]:
    """The browser; the test is skipped where there is none. Asking for the camera is allowed without a click."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=_executable(playwright),
            chromium_sandbox=os.geteuid() != 0,  # Chromium has none for root
            args=[
                "--headless=new",  # the old one has no camera
                "--use-fake-device-for-media-stream",
                "--use-fake-ui-for-media-stream",
                f"--use-file-for-fake-video-capture={film}",
                "--auto-select-tab-capture-source-by-title=FastVLM",  # as the screen that is shared
            ],
        )
        yield browser
        browser.close()


def _executable(playwright: Playwright) -> str:
    found = next(filter(None, map(shutil.which, _CHROMIUMS)), playwright.chromium.executable_path)
    if not Path(found).exists():
        pytest.skip("no Chromium was found: apt-get install chromium, or playwright install chromium")
    return found


@dataclass
class Visit:
    """A page in a browser, and what it did there.

    Attributes:
        asked: the bodies of its questions so far.
        elsewhere: addresses of other servers that it called.
        complaints: what the browser's console has as errors and warnings, and exceptions that nobody caught.
    """

    page: Page
    url: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", self._note)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda line: line.type in ("error", "warning") and self.complaints.append(line.text))

    def _note(self, request: Any) -> None:
        if request.url.endswith("/v1/chat/completions"):
            self.asked.append(json.loads(request.post_data_buffer))
        if not request.url.startswith((self.url, f"blob:{self.url}", "data:")):
            self.elsewhere.append(request.url)

    def open(self) -> Page:
        """The page, with the server's models loaded."""
        self.page.goto(self.url)
        self.page.wait_for_selector("#model option", state="attached")
        return self.page

    def press(self, label: str) -> None:
        self.page.get_by_role("button", name=label, exact=True).click()

    def choose(self, label: str) -> None:
        """Click a choice by its words, as its own circle may not be shown."""
        self.page.locator("label").filter(has_text=label).first.click()

    def answers(self) -> list[str]:
        """Those in the history, newest first."""
        return self.page.locator(".entry-answer").all_inner_texts()

    def asked_prompts(self) -> list[str]:
        """The words of the questions so far. Lets the browser go on meanwhile."""
        self.page.wait_for_timeout(20)
        return [body["messages"][-1]["content"][-1]["text"] for body in self.asked]

    def wait_for_answers(self, number: int) -> list[str]:
        """Those in the history, once there are so many."""
        self.page.locator(".entry").nth(number - 1).wait_for(timeout=20_000)
        return self.answers()

    def answer_with(self, text: str) -> None:
        """Let all questions have this answer from now on, without asking the server."""
        chunk = {"choices": [{"delta": {"content": text}, "finish_reason": "stop"}]}
        stream = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
        self.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream))

    def wait_for_state(self, state: str) -> None:
        self.page.wait_for_selector(f"#state[data-state={state}]", timeout=20_000)

    def number(self, selector: str) -> float:
        """The number that an element begins or ends with."""
        words = self.page.locator(selector).inner_text().split()
        return next(float(word) for word in words if word[0].isdigit())


@contextmanager
def visiting(browser: Browser, url: str, expected: tuple[str, ...] = (), **settings: Any) -> Iterator[Visit]:
    """A fresh browser profile's visit, at whose end the page must have called nobody else and left no complaint.

    Args:
        expected: parts of complaints that belong to the test, as browsers note each refused request.
        settings: of the context: viewport, color_scheme, ….
    """
    context: BrowserContext = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
    context.grant_permissions(["camera", "clipboard-read", "clipboard-write"], origin=url)
    visit = Visit(context.new_page(), url)
    visit.page.set_default_timeout(15_000)
    try:
        yield visit
    finally:
        context.close()
    assert visit.elsewhere == []
    assert [text for text in visit.complaints if not any(part in text for part in expected)] == []
