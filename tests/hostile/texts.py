"""Recipes, settings and records that mean harm, and numbers on the command line that are none."""

from __future__ import annotations

_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefghi", "bcdefghij", strict=True)
)
_MERGES = "a: &a {k0: 1, k1: 1, k2: 1}\n" + "".join(
    f"{after}: &{after} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, after in zip("abcdefghi", "bcdefghij", strict=True)
)

RECIPES: dict[str, bytes] = {
    "aliases that grow to 10^9": _BOMB.encode(),
    "aliases that grow in a known setting": (_BOMB + "optim: {batch_size: *j}\n").encode(),
    "aliases that grow in a known text": (_BOMB + "device: *j\n").encode(),
    "merged keys that grow to 10^9": _MERGES.encode(),
    "a list that holds itself": b"seed: &a [*a]\n",
    "a mapping that holds itself": b"&a {optim: *a}\n",
    "an object of Python": b"seed: !!python/object/apply:os.system ['touch CANARY']\n",
    "a new object of Python": b"!!python/object/new:type {args: [x, [], {}]}\n",
    "a module of Python": b"seed: !!python/module:os\n",
    "a tuple of Python": b"seed: !!python/tuple [1]\n",
    "a tag of its own": b"seed: !run ls\n",
    "nested 20,000 deep": b"[" * 20_000 + b"]" * 20_000,
    "nested 20,000 deep as mappings": b"{a: " * 20_000 + b"}" * 20_000,
    "a list": b"[1, 2]",
    "a number": b"5",
    "text": b"hello",
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "a tab": b"optim:\n\tepochs: 1\n",
    "bytes": bytes(range(256)),
    "UTF-16 cut off": b"\xff\xfes\0e",
    "a key twice": b"seed: 1\nseed: 2\n",
    "a key that is a list": b"? [a]\n: 1\n",
    "a key that is a number": b"5: 1\n",
    "a key that is nothing": b"null: 1\n",
    "a number of 10,000 digits": b"seed: " + b"9" * 10_000 + b"\n",
    "a number of base 60": b"seed: 1" + b":59" * 10_000 + b"\n",
    "a date that is not": b"seed: 2026-99-99\n",
    "a whole number that is none": b"seed: !!int ''\n",
    "a bool that is none": b"seed: !!bool x\n",
    "a date that is none": b"seed: !!timestamp x\n",
    "bytes that are none": b"seed: !!binary x\n",
    "a float that is none": b"seed: !!float x\n",
    "a set": b"seed: !!set {a, b}\n",
    "an ordered map": b"seed: !!omap [a: 1]\n",
    "a control character": b'seed: "\\e[2J"\n',
    "an unknown setting that speaks to the terminal": b'"\\e[2Jx": 1\n',
    "a recipe that extends itself": b"extends: RECIPE\n",
    "a recipe that extends a device": b"extends: /dev/zero\n",
    "a recipe that extends a list": b"extends: [1]\n",
    "a recipe that extends nothing": b"extends: ''\n",
    "a section that is a number": b"optim: 5\n",
    "a section that is a list": b"optim: [1]\n",
    "a section of nothing": b"optim:\n",
    "infinity": b"optim: {lr: .inf}\n",
    "NaN": b"optim: {lr: .nan}\n",
    "1e400": b"optim: {lr: 1e400}\n",
    "a batch of 10^18": b"optim: {batch_size: 1000000000000000000}\n",
    "a batch below zero": b"optim: {batch_size: -4}\n",
    "a model of 10^9 blocks": b"model: {name: x, depth: 1000000000}\n",
    "a model 10^9 wide": b"model: {name: x, embed_dim: 1000000000}\n",
    "an image of 10^9 pixels a side": b"model: {name: x, image_size: [1000000000, 1000000000]}\n",
    "a patch of no pixels": b"model: {name: x, patch_size: 0}\n",
    "a list of 10^5 numbers": b"model: {name: x, image_size: [" + b"1, " * 100_000 + b"1]}\n",
    "10^4 unknown settings": b"".join(b"unknown%d: 1\n" % number for number in range(10_000)),
    "a setting of 10 MB": b"device: " + b"x" * (10 << 20) + b"\n",
    "an unknown setting of 1 MB": b"? " + b"x" * (1 << 20) + b"\n: 1\n",
}

NUMBERS = (
    *(
        "nan",
        "inf",
        "-inf",
        "1e400",
        "-1",
        "0",
        "0x10",
        "1e-400",
        "",
        " ",
        "1,2,3",
        "--1",
        "9" * 5000,
        "1e18",
        "²",
        "١٢",
    ),
    *("1_000", "1/0", "[]", "{", "null", "true", "-0.0", "1e308", "\x1b[2J", "0-999999", "5-1", "1-99999999999"),
)
"""What is given where a number is meant."""
