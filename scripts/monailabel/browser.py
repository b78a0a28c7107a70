"""Segment a head in OHIF, in a real browser without a window, and look at what OHIF then draws over the scan.

    apt-get install chromium chromium-driver orthanc orthanc-dicomweb
    scripts/monailabel/setup.sh VENV && VENV/bin/pip install selenium
    VENV/bin/python scripts/monailabel/browser.py [--keep NEW_FOLDER]

The servers are those of check.py: Orthanc with the average head as a DICOM series, MONAI Label with OHIF. The browser
opens the study in the mode "MONAI Label", presses reload beside the address and runs the segmentation. Screenshots
before and after show how much of the head has colour. Nothing is asked of the network. Prints PASS and FAIL lines.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from check import OURS, count, expect, has_orthanc, ohif_servers, step, workplace
from PIL import Image

try:
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait
except ImportError:
    sys.exit(f"error: no selenium: {sys.executable} -m pip install selenium")

SECONDS = 300  # for the segmentation


def open_browser(folder: Path) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    arguments = ["--headless=new", "--window-size=1400,900", f"--user-data-dir={folder / 'chromium'}"]
    arguments += ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]  # WebGL on the CPU
    arguments += ["--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run"]
    arguments += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # OHIF asks for fonts
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # chromium's does not start as root
    for argument in arguments:
        options.add_argument(argument)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    browser.set_page_load_timeout(120)
    return browser


def pixels(browser: webdriver.Chrome, file: Path) -> np.ndarray:
    """The viewport as (height, width, 3), values 0 to 255; the whole window is kept in the file."""
    browser.save_screenshot(str(file))
    png = browser.find_element(By.CSS_SELECTOR, "canvas.cornerstone-canvas").screenshot_as_png
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def bright(image: np.ndarray) -> np.ndarray:
    return image.min(-1) > 40


def coloured(image: np.ndarray) -> np.ndarray:
    return np.ptp(image, -1) > 8


def check_browser(url: str, work: Path) -> None:
    browser = open_browser(work)

    def find(xpath: str):
        """The first element there that is visible."""

        def visible(_):
            return next((e for e in browser.find_elements(By.XPATH, xpath) if e.is_displayed()), None)

        return WebDriverWait(browser, 120).until(visible, f"not on the page: {xpath}")

    def until(ok, seconds: int) -> np.ndarray:
        """The viewport, when it is ok or the time is over."""
        deadline = time.monotonic() + seconds
        while not ok(image := pixels(browser, work / "screenshot.png")) and time.monotonic() < deadline:
            time.sleep(2)
        return image

    try:
        browser.get(f"{url}/ohif/")
        find("//*[contains(text(), 'average head')]").click()
        expect(True, "OHIF lists the study")
        find("//button[contains(., 'MONAI Label')] | //a[contains(., 'MONAI Label')]").click()
        address = find("//input[@id='monailabelServerURL']")
        expect(True, "the mode MONAI Label opens, with its panel")
        find("//button[contains(., 'Confirm and Hide')]").click()  # "for investigational use only", over the images
        before = until(lambda image: bright(image).mean() > 0.1, 120)
        (work / "screenshot.png").replace(work / "before.png")
        head = bright(before) & ~coloured(before)  # the texts have colour
        expect(head.mean() > 0.1, "it shows the scan, which is grey", f"{head.mean():.1%} of the viewport")

        address.send_keys(Keys.CONTROL, "a")  # OHIF supposes port 8000; clear() ends its panel: an empty address
        address.send_keys(f"{url}/")
        find("//table[@class='settingsTable']//button").click()
        run = find("//button[@title='Run Segmentation']")
        models = {e.get_attribute("value") for e in browser.find_elements(By.CSS_SELECTOR, ".selectBox option")}
        expect(OURS in models, "reload beside the address brings the model", ", ".join(sorted(models)))
        time.sleep(3)  # OHIF makes an empty segmentation, and a second later its colours
        run.click()
        after = until(lambda image: coloured(image)[head].mean() > 0.5, SECONDS)
        new = coloured(after) & ~coloured(before)
        inside, outside = new[head].mean(), new[~head].mean()
        expect(inside > 0.9, "Run lays segments over the scan", f"{inside:.1%} of it has colour")
        expect(outside < 0.02, "and not beside it", f"{outside:.2%} of the rest")
        colours = len(np.unique(after[new & head] // 64, axis=0))
        expect(colours > 5, "in several colours", colours)
    finally:
        (work / "console.log").write_text("\n".join(str(line) for line in browser.get_log("browser")))
        browser.quit()


def main(bundle: Path | None, keep: Path | None) -> int:
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    missing += [] if has_orthanc() else ["Orthanc with its DICOMweb plugin"]
    if missing:
        packages = "chromium chromium-driver orthanc orthanc-dicomweb"
        sys.exit(f"error: no {', no '.join(missing)}: apt-get install {packages}")
    with workplace(keep, bundle, "cpu") as (work, environment), step("OHIF in a browser"):
        with ohif_servers(work, environment) as (url, _, _):
            check_browser(url, work)
    print(f"{count['PASS']} passed, {count['FAIL']} failed")
    return 1 if count["FAIL"] else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="the unpacked bundle (default: built from the repository)")
    parser.add_argument("--keep", type=Path, help="new folder that keeps logs and screenshots")
    sys.exit(main(**vars(parser.parse_args())))
