#!/usr/bin/env python3
"""Recomputes the cached-token ratio of a replay from nothing but its requests.

    recompute_hits.py TRACE PER_REQUEST [--block-size N] [--kv-tokens N] [--engine-block N]

TRACE is the trace that was sent (.jsonl or .jsonl.gz, or a sample's file), PER_REQUEST the file that
`forebay replay --per-request` or `forebay compare --per-request` wrote. Each worker is an exact LRU
over the trace's own blocks, in the order in which its requests got their first token; answers take
room and are never found again. What the engines said (`cached_tokens`) is used for the comparison only.

Nothing here knows Forebay's code: Python's standard library, and the trace's block ids.
"""

import argparse
import collections
import gzip
import json
import os
import sys


def trace_of(path, block_size):
    if block_size is None:
        manifest = os.path.join(os.path.dirname(os.path.abspath(path)), "manifest.json")
        if os.path.exists(manifest):
            with open(manifest, encoding="utf-8") as file:
                for entry in json.load(file)["traces"]:
                    if entry["file"] == os.path.basename(path):
                        block_size = entry["block_size"]
    block_size = block_size or 512
    opened = gzip.open if path.endswith(".gz") else open
    requests = []
    with opened(path, "rt", encoding="utf-8") as file:
        for line in file:
            if not line.strip():
                continue
            request = json.loads(line)
            blocks = []
            for run in request.get("hash_ids", []):
                if isinstance(run, list):
                    blocks.extend(range(run[0], run[0] + run[1]))
                else:
                    blocks.append(run)
            requests.append((request["input_length"], request["output_length"], blocks))
    return block_size, requests


class Cache:
    """An exact LRU of one worker, in tokens. The root of a path is the newest of it."""

    def __init__(self, kv_tokens):
        self.room = kv_tokens
        self.used = 0
        self.blocks = collections.OrderedDict()

    def put(self, key, tokens):
        if key in self.blocks:
            self.blocks.move_to_end(key)
            return
        self.blocks[key] = tokens
        self.used += tokens
        while self.used > self.room:
            _, gone = self.blocks.popitem(last=False)
            self.used -= gone

    def serve(self, number, block_size, length, output, blocks, engine_block):
        hit = 0
        sizes = []
        left = length
        for block in blocks:
            size = min(block_size, left)
            left -= size
            if size <= 0:
                break
            # What is cut off is not the block that others have.
            key = block if size == block_size else (block, size)
            sizes.append((key, size))
        for key, size in sizes:
            if key not in self.blocks:
                break
            hit += size
        hit = min(hit, length - 1) // engine_block * engine_block
        rest = output + max(left, 0)
        if rest:
            self.put(("rest", number), rest)
        for key, size in reversed(sizes):
            self.put(key, size)
        return hit


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("per_request")
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--kv-tokens", type=int, default=3_000_000)
    parser.add_argument("--engine-block", type=int, default=16)
    parser.add_argument("--within", type=float, default=2.0, help="points by which both may differ")
    options = parser.parse_args()

    block_size, requests = trace_of(options.trace, options.block_size)
    lines = []
    with open(options.per_request, encoding="utf-8") as file:
        for line in file:
            line = json.loads(line)
            if line["outcome"] == "ok" and line["worker"] and line["cached_tokens"] is not None:
                lines.append(line)
    if not lines:
        sys.exit("no answered request names its worker and its cached tokens")
    lines.sort(key=lambda line: line["first_byte_ms"])
    caches = collections.defaultdict(lambda: Cache(options.kv_tokens))
    prompt = said = mine = 0
    for line in lines:
        length, output, blocks = requests[line["index"]]
        prompt += line["prompt_tokens"]
        said += line["cached_tokens"]
        mine += caches[line["worker"]].serve(line["index"], block_size, length, output, blocks, options.engine_block)
    result = {
        "requests": len(lines),
        "workers": len(caches),
        "reported_ratio": said / prompt,
        "recomputed_ratio": mine / prompt,
        "difference_points": 100 * abs(said - mine) / prompt,
    }
    print(json.dumps(result))
    if result["difference_points"] > options.within:
        sys.exit(1)


if __name__ == "__main__":
    main()
