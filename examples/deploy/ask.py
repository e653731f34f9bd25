"""Ask a proxy for embeddings of the lines of standard input, with nothing but Python's standard library.

python ask.py http://127.0.0.1:8080/v1 API_KEY_FILE < texts.txt > embeddings.jsonl
"""

import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def call(url: str, key: str, body: Any = None) -> Any:
    """The answer to a GET, or to a POST of ``body``."""
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def model_of(url: str, key: str) -> str:
    """The model's name, after waiting a minute for a proxy that is not there yet."""
    until = time.monotonic() + 60
    while True:
        try:
            return str(call(f"{url}/models", key)["data"][0]["id"])
        except urllib.error.URLError as error:
            if isinstance(error, urllib.error.HTTPError) or time.monotonic() > until:
                raise
        time.sleep(0.5)


def main(url: str, key_file: str) -> None:
    key = Path(key_file).read_text().strip()
    model = model_of(url, key)
    texts = [line.strip() for line in sys.stdin if line.strip()]
    for found in call(f"{url}/embeddings", key, {"model": model, "input": texts})["data"]:
        print(json.dumps(found["embedding"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
