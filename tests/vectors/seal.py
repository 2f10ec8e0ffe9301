"""Writes sealed.tsv with Python's `cryptography` (OpenSSL): python3 seal.py > sealed.tsv. seal.go writes the very same."""

from base64 import b64encode

from cryptography.hazmat.primitives.ciphers.aead import AESGCM


def counted(first, length):
    return bytes((first + n) % 256 for n in range(length))


CURRENT, PREVIOUS, OTHER = counted(0, 32), counted(100, 32), counted(200, 32)
ROW, OTHER_ROW = counted(160, 16), counted(161, 16)
# What it is for, the key, what it is bound to, the text. The backend's form is bound to nothing.
CASES = [
    ("current", CURRENT, b"", b"sk-sealed-under-the-current-key"),
    ("previous", PREVIOUS, b"", b"sk-sealed-under-the-previous-key"),
    ("other", OTHER, b"", b"sk-sealed-under-another-key"),
    ("empty", CURRENT, b"", b""),
    ("no-text", CURRENT, b"", b"\xff\xfe"),
    ("lines", CURRENT, b"", b"two lines\nand more"),
    ("long", CURRENT, b"", b"k" * 4096),
    ("row", CURRENT, ROW, b"sk-of-a-row"),
    ("row-previous", PREVIOUS, ROW, b"sk-of-a-row-before"),
    ("other-row", CURRENT, OTHER_ROW, b"sk-of-another-row"),
]

for number, (name, key, row, text) in enumerate(CASES):
    nonce = counted(12 * number, 12)
    sealed = nonce + AESGCM(key).encrypt(nonce, text, row)
    print("\t".join([name, b64encode(key).decode(), row.hex(), text.hex(), b64encode(sealed).decode()]))
