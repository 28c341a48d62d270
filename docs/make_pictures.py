"""Makes the pictures of the README from a real server, and that of a plan's report: `python -m docs.make_pictures`
(needs Chromium); `--only report` makes the latter alone.

It starts `moejax serve`, generates text, kills a rank with SIGKILL meanwhile, and records what a terminal and a browser
show. The pictures contain only what happened.
"""

import argparse
import html
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver

from benchmarks.launch import launched
from planner.cli.main import main as planner
from serving.api.client import Client
from tests.support import browser

FOLDER = Path(__file__).resolve().parent / "pictures"
COLUMNS, LINE, MARGIN = 84, 20, 16
HOLD_S = 6.0
"""Seconds for which the end is shown before the recording starts again."""
Piece = tuple[float, str, str]
"""The time in seconds, the text, and its CSS class: "" or one of _STYLE."""
_STYLE = (
    "text{font:14px ui-monospace,Menlo,Consolas,monospace;fill:#d7e4e2;white-space:pre}"
    ".p{fill:#2dd4bf}.k{fill:#f87171}.q{fill:#93a8a6}"
)


def record(address: str, prompt: str, tokens: int) -> list[Piece]:
    """Generate, kill the rank that serves the stream, and list the events, as a terminal would show them."""
    began, pieces = time.monotonic(), []

    def note(text: str, style: str = "") -> None:
        pieces.append((time.monotonic() - began, text, style))

    command = ["generate", prompt, "--max-tokens", str(tokens), "--temperature", "0"]
    note(f'$ moejax generate "{prompt}" --max-tokens {tokens} --temperature 0\n', "p")
    process = subprocess.Popen(
        [sys.executable, "-m", "serving", *command, "--server", address],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    pieces_read, killed, last = 0, False, 0
    with Client(address) as client:
        last = max((event.sequence for event in _events(client)), default=0)
        while data := os.read(process.stdout.fileno(), 4096):
            note(data.decode(errors="replace"))
            pieces_read += 1
            if not killed and pieces_read > tokens // 3:
                killed = True
                rank = max(client.status().ranks, key=lambda each: each.running)
                assert rank.pid is not None
                os.kill(rank.pid, signal.SIGKILL)
                note(f" ⟨kill -9 {rank.pid}: rank {rank.id}⟩", "k")
        process.wait()
        time.sleep(1.0)
        note("\n$ moejax events\n", "p")
        for event in _events(client):
            if event.sequence > last and event.kind in ("rank_lost", "recovered"):
                phases = ", ".join(f"{name} {ms:.0f}" for name, ms in event.phases.items() if name != "total")
                total = f"  {event.phases['total']:.0f} ms ({phases})" if event.phases else ""
                note(f"{event.kind:<10} epoch {event.epoch}  rank {event.rank}{total}\n", "q")
    return pieces


def _events(client: Client) -> list:
    events = []
    try:
        for event in client.watch(timeout_s=0.5):
            events.append(event)
    except Exception as error:  # the stream ends only by its deadline
        if type(error).__name__ != "DeadlineExceeded":
            raise
    return events


def animation(pieces: list[Piece]) -> str:
    """A recording as an animated SVG. Where animation is off, it shows everything at once."""
    whole = pieces[-1][0] + HOLD_S
    row, column, rows = 0, 0, [[]]
    for at, text, style in pieces:
        for part in _split(text):
            if part == "\n" or column + len(part) > COLUMNS:
                row, column = row + 1, 0
                rows.append([])
            if part != "\n":
                shown = part.lstrip() if column == 0 else part
                rows[row].append((at, column, shown, style))
                column += len(shown)
    spans, rules, times = [], [], {}
    for y, parts in enumerate(rows):
        for at, x, text, style in parts:
            name = times.setdefault(round(at, 2), f"t{len(times)}")
            place = f'x="{MARGIN + x * 8.43:.1f}" y="{MARGIN + 28 + y * LINE}"'
            spans.append(f'<text {place} class="{name} {style}">{html.escape(text)}</text>')
    for at, name in times.items():
        share = 100 * at / whole
        rules.append(f"@keyframes {name}{{0%,{share:.2f}%{{opacity:0}}{share + 0.01:.2f}%,100%{{opacity:1}}}}")
        rules.append(f".{name}{{animation:{name} {whole:.1f}s infinite}}")
    still = "@media(prefers-reduced-motion:reduce){text{animation:none!important}}"
    width, height = int(2 * MARGIN + COLUMNS * 8.43), 2 * MARGIN + 20 + LINE * len(rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<style>{_STYLE}{''.join(rules)}{still}</style>"
        f'<rect width="100%" height="100%" rx="10" fill="#0e1414"/>'
        '<circle cx="18" cy="16" r="5" fill="#f87171"/><circle cx="34" cy="16" r="5" fill="#facc15"/>'
        f'<circle cx="50" cy="16" r="5" fill="#4ade80"/>{"".join(spans)}</svg>\n'
    )


def _split(text: str) -> list[str]:
    """The words of a text, each with the space before it, and the line ends."""
    parts, word = [], ""
    for character in text:
        if character == "\n" or (character == " " and word.strip()):
            parts += [word] if word else []
            word = ""
            if character == "\n":
                parts.append("\n")
                continue
        word += character
    return [*parts, word] if word else parts


def dashboard(address: str, url: str, prompt: str) -> None:
    """Take screenshots during a chat in which a rank is killed: light at full width, dark on a phone."""
    pictures = (("dashboard", 1280, "mesh", False), ("dashboard-phone", 390, "rate", True))
    for name, width, last_panel, dark in pictures:
        with browser.chromium(width=width, height=900, dark=dark) as driver:
            driver.get(url)
            time.sleep(2)
            driver.find_element("id", "prompt").send_keys(prompt + "\n")
            time.sleep(3)
            with Client(address) as client:
                alive = [rank for rank in client.status().ranks if rank.state == "serving"]
            rank = max(alive, key=lambda each: each.running).id
            for _ in range(2):  # the first press asks whether it is meant
                driver.find_element("css selector", f"#rank-{rank} button.kill").click()
            time.sleep(2.5)
            end_below(driver, f"{last_panel}-panel", width)
            driver.save_screenshot(FOLDER / f"{name}.png")
            time.sleep(8)  # until the rank has rejoined


def end_below(driver: webdriver.Chrome, panel: str, width: int) -> None:
    """Let the page, which was scrolled to the prompt, begin at its top, and the window end below a panel."""
    driver.execute_script("document.documentElement.style.scrollbarWidth = 'none'; scrollTo(0, 0)")
    below = f"return document.getElementById('{panel}').getBoundingClientRect().bottom"
    for _ in range(5):  # a panel may grow meanwhile, and in a window of another size
        bottom = round(driver.execute_script(below)) + 14
        browser.resize(driver, width=width, height=bottom)
        if round(driver.execute_script(below)) + 14 == bottom:
            return


def report() -> None:
    """Take a screenshot of the page of `moejax plan report` on DeepSeek-V3 on 40 hosts, light."""
    with tempfile.TemporaryDirectory() as folder:
        plan, page = f"{folder}/plan.json", f"{folder}/report.html"
        given = ["--survive", "ranks=1,hosts=1", "--skew", "0.8", "--out", plan]
        assert planner(["solve", "deepseek-v3", "h200:40x8", *given]) == 0
        assert planner(["report", plan, "--html", page]) == 0
        with browser.chromium(width=1120, height=900, dark=False) as driver:
            driver.get(f"file://{page}")
            bottom = driver.execute_script("return document.querySelector('main').getBoundingClientRect().bottom")
            browser.resize(driver, width=1120, height=round(bottom))
            driver.save_screenshot(FOLDER / "planner" / "report.png")


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-moe")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--question", default="Why is the sky blue? Explain it to a child.")
    parser.add_argument("--only", choices=("server", "report"))
    options = parser.parse_args()
    if options.only != "server":
        report()
    if options.only == "report":
        return
    with launched(options.model, options.ranks) as server:
        pieces = record(server.address, options.prompt, 90)
        (FOLDER / "survive.svg").write_text(animation(pieces))
        time.sleep(10)
        url = next(word for word in server.output().split() if word.startswith("http://"))
        dashboard(server.address, url, options.question)


if __name__ == "__main__":
    main()
