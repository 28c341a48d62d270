"""The dashboard in a real browser: chat, a rank dies, the text goes on, and the page shows it."""

import json

import pytest

from serving.auth.api_keys import ApiKeyFile
from serving.auth.limits import CallLimits
from serving.config import Settings
from tests.support.fake_backend import FakeBackend
from tests.support.fake_server import serve_in_thread

pytest.importorskip("selenium", reason="needs the dev tools")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.support import browser

pytestmark = pytest.mark.skipif(not browser.installed(), reason=browser.MISSING)

REPLY = "The mesh shrinks and the text goes on without a gap, word by word, until it is told in full. " * 2


@pytest.fixture(scope="module")
def driver():
    with browser.chromium() as driver:
        yield driver


@pytest.fixture(autouse=True)
def no_page_of_a_server_that_is_gone(driver):
    driver.get("about:blank")
    driver.get_log("browser")
    yield
    driver.get("about:blank")


@pytest.fixture
def told() -> FakeBackend:
    """A backend that answers slowly enough to kill a rank meanwhile."""
    return FakeBackend(reply=list(REPLY.encode()), delay_s=0.01)


def wait(driver, condition, what: str = "") -> None:
    WebDriverWait(driver, 15, poll_frequency=0.05).until(lambda _: condition(), what)


def text(driver, selector: str) -> str:
    return driver.find_element(By.CSS_SELECTOR, selector).text


def errors(driver) -> list[str]:
    """The errors in the page's console, without the HTTP statuses that a test provoked."""
    said = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    return [message for message in said if "status of 401" not in message]


def test_a_rank_dies_and_the_text_goes_on(driver, told):
    with serve_in_thread(told) as server:
        driver.get(server.url)
        wait(driver, lambda: text(driver, "#state") == "ready")
        assert text(driver, "#headline") == "All streams are served by 4 of 4 ranks."
        driver.find_element(By.ID, "prompt").send_keys("What happens?", Keys.ENTER)
        wait(driver, lambda: len(text(driver, ".turn.assistant")) > 20)
        kill, other = (driver.find_element(By.CSS_SELECTOR, f"#rank-{rank} button.kill") for rank in (2, 1))
        other.click()
        kill.click()
        assert (kill.text, kill.get_attribute("aria-label")) == ("Sure?", "Kill rank 2: press again to do it")
        assert told.killed == []
        kill.click()
        wait(driver, lambda: "dead" in driver.find_element(By.ID, "rank-2").get_attribute("class"))
        wait(driver, lambda: text(driver, "#headline") == "Answers are degraded: 1 expert missing.")
        wait(driver, lambda: "Rank 2 was lost at" in text(driver, "#headline-lines"))
        assert "No request failed" in text(driver, "#headline-lines")
        wait(driver, lambda: "1 lost rank marked" in text(driver, "#peak"))
        assert driver.find_element(By.CSS_SELECTOR, "#rank-2 button.kill").get_attribute("disabled")
        wait(driver, lambda: not driver.find_elements(By.CSS_SELECTOR, ".turn.open"), "the end of the answer")
        marks = [mark.text for mark in driver.find_elements(By.CSS_SELECTOR, ".turn mark")]
        answer = text(driver, ".turn.assistant")
        assert [mark for mark in marks if "rank 2 lost" in mark] == marks != []
        for mark in marks:
            answer = answer.replace(mark, "")
        assert " ".join(answer.split()) == REPLY.strip()
        assert "rank 2 lost" in text(driver, "#recoveries")
        assert "adopt 38.0" in text(driver, "#recoveries")
        assert "rank lost" in text(driver, "#events")
        assert text(driver, "#figures").startswith("3 / 4")
        assert errors(driver) == []
        wait(driver, lambda: other.text == "Kill", "the press of a button is forgotten")
    assert told.killed == [(2, "SIGKILL")]


def test_experts_prices_and_coverage_are_those_of_the_status(driver, told):
    with serve_in_thread(told) as server:
        driver.get(server.url)
        wait(driver, lambda: driver.find_elements(By.CSS_SELECTOR, "#experts .slots span"))
        status = told.status()
        cells = "return [...document.querySelectorAll('#experts .slots span')].map((span) => span.textContent)"
        shown = driver.execute_script(cells)  # at once: the cells are made again with each status
        by_row = [str(e) for layer in range(2) for rank in status.ranks for e in rank.slots[layer]]
        assert shown == by_row
        assert text(driver, "#rank-1 .price") == "if lost: ~81 ms, reload 1 expert"
        assert text(driver, "#rank-3 .price").endswith("not prepared")
        assert "loss of 2 ranks" in text(driver, "#lattice")
        assert "50 % prepared" in text(driver, "#lattice")


def test_without_chaos_there_is_nothing_to_kill_with(driver, told):
    told.chaos = False
    with serve_in_thread(told) as server:
        driver.get(server.url)
        wait(driver, lambda: driver.find_elements(By.ID, "rank-0"))
        assert not any(b.is_displayed() for b in driver.find_elements(By.CSS_SELECTOR, "button.kill"))


def test_a_server_with_keys_asks_for_one_and_keeps_it_in_the_tab(driver, told, tmp_path):
    keys = ApiKeyFile(tmp_path / "keys.json")
    secret = keys.add("person")
    with serve_in_thread(told, limits=CallLimits.of(Settings(api_keys=str(keys.path)))) as server:
        driver.get(server.url)
        wait(driver, lambda: driver.find_element(By.ID, "key-dialog").get_attribute("open"))
        driver.find_element(By.ID, "key").send_keys(secret, Keys.ENTER)
        wait(driver, lambda: text(driver, "#state") == "ready")
        assert driver.execute_script("return [localStorage.length, document.cookie]") == [0, ""]
        driver.find_element(By.ID, "prompt").send_keys("Hello", Keys.ENTER)
        wait(driver, lambda: len(text(driver, ".turn.assistant")) > 20)
        assert errors(driver) == []


def test_the_page_can_be_used_with_the_keyboard_alone(driver, told):
    with serve_in_thread(told) as server:
        driver.get(server.url)
        wait(driver, lambda: driver.find_elements(By.ID, "rank-3"))
        reached = set()
        for _ in range(25):
            driver.switch_to.active_element.send_keys(Keys.TAB)
            active = driver.switch_to.active_element
            reached.add(active.get_attribute("id") or active.get_attribute("aria-label"))
        assert reached >= {"turns", "prompt", "send", "clear", "Kill rank 0", "Hang rank 3", "experts"}


@pytest.mark.parametrize(("width", "dark"), [(360, True), (1280, False)])
def test_nothing_is_wider_than_the_window_and_text_has_contrast(told, width, dark):
    with serve_in_thread(told) as server, browser.chromium(width=width, height=800, dark=dark) as driver:
        driver.get(server.url)
        wait(driver, lambda: driver.find_elements(By.CSS_SELECTOR, "#experts .slots span"))
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        page, ink = driver.execute_script(
            "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color];"
        )
        assert contrast(page, ink) > 7


def contrast(one: str, other: str) -> float:
    """WCAG's contrast of two rgb(...) colours."""

    def luminance(colour: str) -> float:
        parts = json.loads("[" + colour.partition("(")[2].rstrip(")") + "]")[:3]
        linear = [c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
