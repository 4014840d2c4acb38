"""Shows every picture of tools/wild to a real Chromium on a white page and to our decoder, and says where they differ.

    python -m tools.wild.compare [--json FILE]

It ends with 1 if one is read and looks other by more than a level.
"""

import argparse
import base64
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from playwright.sync_api import Page

from model_store.errors import ImageRejected
from model_store.files import write_atomically
from model_store.images import DATA_FORMATS, render
from tools.console.browser import chromium
from tools.wild.pictures import Picture, pictures, upright

LEVELS: Final = 1  # of 255, that the same picture may differ by
DRAW: Final = """async (file) => {
  const image = new Image();
  image.src = 'data:application/octet-stream;base64,' + file;
  try { await image.decode(); } catch { return null; }
  const canvas = document.createElement('canvas');
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext('2d', {willReadFrequently: true});
  context.fillStyle = 'white';
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
  let text = '';
  for (let at = 0; at < pixels.length; at += 8192) text += String.fromCharCode(...pixels.subarray(at, at + 8192));
  return [canvas.width, canvas.height, btoa(text)];
}"""


@dataclass(frozen=True)
class Comparison:
    """levels: the largest difference; None if one side refused, -1 if the sizes differ.  refusal: in our words."""

    name: str
    levels: int | None
    refusal: str = ""
    shown: bool = True

    @property
    def wrong(self) -> bool:
        """Read by both, and not the same picture."""
        return self.levels is not None and not 0 <= self.levels <= LEVELS


def draw(page: Page, data: bytes) -> NDArray[np.uint8] | None:
    """[H, W, 3] as Chromium shows it; None if it refuses."""
    drawn = page.evaluate(DRAW, base64.b64encode(data).decode())
    if drawn is None:
        return None
    width, height, text = drawn
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width, 4)[..., :3]


def compare(page: Page, files: Iterable[Picture]) -> Iterator[Comparison]:
    for file in files:
        drawn = draw(page, file.whole or file.data)
        try:
            ours = np.asarray(render(file.data, formats=DATA_FORMATS))
        except ImageRejected as error:
            yield Comparison(file.name, None, str(error), drawn is not None)
            continue
        if drawn is None:
            yield Comparison(file.name, None, "", shown=False)
            continue
        expected = upright(drawn, file.turned)
        same = expected.shape == ours.shape
        yield Comparison(file.name, int(np.abs(expected.astype(int) - ours).max()) if same else -1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.wild.compare", description=__doc__)
    parser.add_argument("--json", type=Path, help="file for every comparison")
    options = parser.parse_args()
    with chromium() as browser:
        results = list(compare(browser.new_page(), pictures()))
    for result in results:
        if result.wrong or result.refusal or not result.shown:
            print(f"{result.name}: {result.levels} {result.refusal} {'' if result.shown else 'refused by Chromium'}")
    wrong = [result for result in results if result.wrong]
    read = [result for result in results if result.levels is not None]
    print(f"{len(results)} files, {len(read)} read by both, {len(wrong)} of these wrong by more than {LEVELS} level")
    if options.json:
        write_atomically(options.json, json.dumps([asdict(result) for result in results], indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
