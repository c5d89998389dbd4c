"""Chromium without a window, spoken to by its own protocol: what a page does when somebody looks at it."""

from __future__ import annotations

import asyncio
import base64
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


@dataclass
class Visit:
    """What came of looking at a page."""

    answers: list[Any] = field(default_factory=list)
    """Of each expression, its value."""
    trouble: list[str] = field(default_factory=list)
    """Exceptions, and what the console was told: a script that the page's policy stops is among them."""
    requests: list[str] = field(default_factory=list)
    screenshot: bytes = b""


def visit(
    page: Path, folder: Path, steps: Sequence[str | tuple[str, dict[str, Any]]], *, width: int = 1200, height: int = 900
) -> Visit:
    """Opens a page from disk and takes the steps: an expression is evaluated, a pair is a command of the protocol."""
    assert CHROMIUM is not None, "tests that come here are skipped without it"
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
    ]
    process = subprocess.Popen([*command, "about:blank"], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        address = next(found[1] for line in process.stderr if (found := re.search(r"ws://([^/]+)/", line)))
        return asyncio.run(asyncio.wait_for(_visit(page, address, steps, width, height), 60))
    finally:
        process.kill()
        process.wait()


async def _visit(page: Path, address: str, steps: Sequence[str | tuple[str, dict[str, Any]]], width: int, height: int) -> Visit:
    import aiohttp

    done = Visit()
    async with aiohttp.ClientSession() as session:
        tabs = await (await session.get(f"http://{address}/json")).json()
        tab = next(tab for tab in tabs if tab["type"] == "page")
        async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            number = 0

            async def call(method: str, **given: Any) -> dict[str, Any]:
                nonlocal number
                number += 1
                await socket.send_json({"id": number, "method": method, "params": given})
                while True:
                    said = await socket.receive_json()
                    if said.get("id") == number:
                        assert "error" not in said, said
                        return said["result"]
                    _note(done, said)

            for domain in ("Page", "Runtime", "Log", "Network"):
                await call(f"{domain}.enable")
            await call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
            await call("Page.navigate", url=page.absolute().as_uri())
            ready = "document.readyState === 'complete' && location.protocol === 'file:'"
            while not (await call("Runtime.evaluate", expression=ready))["result"]["value"]:
                await asyncio.sleep(0.05)
            for step in steps:
                if isinstance(step, str):
                    found = await call("Runtime.evaluate", expression=step, returnByValue=True)
                    assert "exceptionDetails" not in found, found["exceptionDetails"]
                    done.answers.append(found["result"].get("value"))
                else:
                    await call(step[0], **step[1])
            done.screenshot = base64.b64decode((await call("Page.captureScreenshot"))["data"])
    return done


def _note(done: Visit, said: dict[str, Any]) -> None:
    if said["method"] == "Network.requestWillBeSent":
        done.requests.append(said["params"]["request"]["url"])
    elif said["method"] in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
        done.trouble.append(str(said["params"]))
