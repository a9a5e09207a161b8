"""A reader's first evening: JupyterLab opens at week 1, all cells run, the claims table is there."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from shared.runtime.files import repository_root

NOTEBOOK = "phase1-fundamentals/week1-attention/01_attention_mechanisms.ipynb"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [pytest.mark.browser, pytest.mark.slow]
if CHROMIUM is None and not os.environ.get("CI"):  # in CI a missing browser is a failure
    pytestmark.append(pytest.mark.skip(reason="no Chromium here; Debian: apt-get install chromium"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a copy of week 1's folder, so that the committed notebook stays as it is."""
    root = tmp_path / "course"
    week = root / NOTEBOOK
    week.parent.mkdir(parents=True)
    for file in (repository_root() / NOTEBOOK).parent.iterdir():
        if file.is_file():
            shutil.copy(file, week.parent)
    port = free_port()
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--allow-root", "--IdentityProvider.token=", f"--ServerApp.root_dir={root}"]
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_DATA_DIR": str(tmp_path / "data"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
    }
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/api", timeout=1)
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "lab.log").read_text()[-2000:]
                time.sleep(0.25)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)


def scroll_until(page, wanted):
    """Scroll down from the top until `wanted` is in the page, at most to the end."""
    panel = page.locator(".jp-WindowedPanel-outer").first
    panel.evaluate("panel => { panel.scrollTop = 0 }")
    for _ in range(1000):
        page.wait_for_timeout(50)
        if wanted.count():
            return
        panel.evaluate("panel => { panel.scrollTop += 400 }")


def test_week_1_runs_in_jupyterlab_and_ends_in_its_claims_table(lab):
    from playwright.sync_api import sync_playwright

    options = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"{lab}/lab/tree/{NOTEBOOK}?reset")
        page.wait_for_selector(".jp-Notebook", timeout=120_000)
        page.wait_for_selector("text=Python 3 (ipykernel)", timeout=120_000)
        page.keyboard.press("Escape")
        page.get_by_role("menuitem", name="Edit", exact=True).click()
        page.get_by_role("menuitem", name="Clear Outputs of All Cells").click()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        # The status bar says Idle again once the last cell has run; only cells in view are in the page.
        page.wait_for_selector(".jp-StatusBar-Widget >> text=/Busy/", timeout=60_000)
        page.wait_for_selector(".jp-StatusBar-Widget >> text=/Idle/", timeout=600_000)
        table = page.locator("table", has=page.locator("th", has_text="Verdict"))
        scroll_until(page, table)
        assert table.count() == 1, "no claims table in the executed notebook"
        verdicts = [text.strip() for text in table.locator("tbody td:last-child").all_text_contents()]
        assert len(verdicts) >= 4
        assert all(verdict == "✓ holds" for verdict in verdicts), verdicts
        browser.close()
