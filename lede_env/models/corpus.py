"""The training text of the embedded model: Python source from pinned PyPI wheels, and optional prose.

    wheels (corpus_wheels.txt) --download--> *.py --filter, deduplicate--> python.{train,heldout}.txt.xz
    prose.txt.xz ------------------------------------------split-------------> prose.{train,heldout}.txt.xz
    *.train.txt.xz --byte-level BPE (tokenizer.json)--> *.train.npy, uint16, <|endoftext|> before each

Every text file holds UTF-8 documents separated by NUL. A document is held out when its SHA-256 is divisible
by 100, so a rebuilt corpus never trains on what was held out before. The wheels are those of one pinned target,
whatever the machine, and no order depends on the threads that download them: the sha256 in manifest.json, of
each text before compression, tells whether two corpora are the same.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import multiprocessing
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from email.parser import Parser
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import track

from lede_env.errors import LedeError

END_OF_TEXT = "<|endoftext|>"  # id 0: begins a prompt, ends and separates documents
DOMAINS = ("python", "prose")
WHEEL_LIST = Path(__file__).with_name("corpus_wheels.txt")

# One target for every machine, so that all of them download the same wheels.
PIP_TARGET = ["--python-version=3.11", "--implementation=cp"] + [
    f"--platform={tag}_x86_64"
    for tag in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
]
PERMISSIVE = re.compile(
    r"\b(mit|bsd|0bsd|apache|isc|psf|python software foundation|unlicense|hpnd|zpl|zope|public domain)\b",
    re.IGNORECASE,
)
RESTRICTIVE = re.compile(
    r"gpl|gnu|\bmpl|mozilla|eclipse|\bepl|proprietary|commercial|\bcc[- ]by|sspl|busl|elastic|\beupl|cddl",
    re.IGNORECASE,
)
SKIPPED_FOLDERS = re.compile(
    r"(^|/)(tests?|testing|test_[^/]*|[^/]*_tests?|_?vendor(ed)?|_vendored?|third_?party|externals?|extern|"
    r"migrations|locales?|[^/]*\.data|[^/]*\.dist-info)/"
)
SKIPPED_FILES = re.compile(r"(^|/)(test_[^/]*|[^/]*_tests?|tests?|conftest|[^/]*_pb2(_grpc)?|_version)\.py$")
GENERATED = re.compile(
    r"(auto-?|automatically )generated|generated (by|from|file|code|automatically)|do not (edit|modify)",
    re.IGNORECASE,
)
LICENCE_HEADER = re.compile(r"licen[cs]e|copyright", re.IGNORECASE)

MIN_BYTES, MAX_BYTES = 400, 200_000  # of a Python file
MAX_LINE = 400  # characters; longer lines are data
MAX_DIGITS = 0.15  # share of characters; above it the file is a table
MAX_NON_ASCII = 0.10
PACKAGE_BYTES = 4_000_000  # no package contributes more


class Package(NamedTuple):
    """What one wheel gave: its documents in path order, before deduplication."""

    name: str
    version: str
    licence: str
    documents: list[str]


# ---------------------------------------------------------------------------------------------- Python source


def licence_of(metadata: Message) -> str | None:
    """The licence a wheel's METADATA declares, if it is a permissive one, else None."""
    declared = [c.rpartition("::")[2].strip() for c in metadata.get_all("Classifier", []) if "License" in c]
    if expression := metadata.get("License-Expression"):
        declared = [expression]
    elif not [d for d in declared if d != "OSI Approved"]:
        declared = [(metadata.get("License") or "").strip().split("\n")[0][:100]]
    text = "; ".join(declared)
    return text if PERMISSIVE.search(text) and not RESTRICTIVE.search(text) else None


def strip_licence_header(text: str) -> str:
    """Without the comment block a file opens with, if that block is a licence or copyright notice."""
    lines = text.splitlines(keepends=True)
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    if not LICENCE_HEADER.search("".join(lines[:end])):
        return text
    return "".join(lines[end:]).lstrip("\n")


def python_document(path: str, content: bytes) -> str | None:
    """The text of a source file if it is worth training on: written by hand, no tests, no data."""
    if SKIPPED_FOLDERS.search(path) or SKIPPED_FILES.search(path):
        return None
    if not MIN_BYTES <= len(content) <= MAX_BYTES or b"\0" in content:
        return None
    try:
        text = content.decode().removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
    if GENERATED.search(text[:1000]) or END_OF_TEXT in text:
        return None
    text = strip_licence_header(text).rstrip()
    if len(text) < MIN_BYTES or max(map(len, text.split("\n"))) > MAX_LINE:
        return None
    digits = len(re.findall(r"[0-9]", text))
    non_ascii = len(re.findall(r"[^\x00-\x7f]", text))
    if digits > MAX_DIGITS * len(text) or non_ascii > MAX_NON_ASCII * len(text):
        return None
    return text + "\n"


def read_wheel(wheel: Path) -> Package:
    """The documents of a wheel. Raises LedeError when its licence is not a permissive one."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(archive.namelist())
        metadata_name = next(n for n in names if re.fullmatch(r"[^/]*\.dist-info/METADATA", n))
        metadata = Parser().parsestr(archive.read(metadata_name).decode(errors="replace"), headersonly=True)
        licence = licence_of(metadata)
        if licence is None:
            raise LedeError(f"{wheel.name}: no permissive licence in its METADATA; remove it from the wheel list")
        texts = (python_document(n, archive.read(n)) for n in names if n.endswith(".py"))
        return Package(metadata["Name"], metadata["Version"], licence, [t for t in texts if t])


def download(requirement: str) -> Package:
    """Download one wheel (`name==version`), read it, delete it. Raises LedeError when pip cannot."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        result = subprocess.run(
            [*command, *PIP_TARGET, "-d", folder, requirement], capture_output=True, text=True, check=False
        )
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or not wheels:
            raise LedeError(f"{requirement}: pip download failed: {result.stderr.strip()[-300:]}")
        return read_wheel(wheels[0])


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def deduplicate(packages: list[Package], package_bytes: int = PACKAGE_BYTES) -> list[Package]:
    """Drop documents seen in an earlier package, then cap each package (in hash order, a fair cut)."""
    seen: set[int] = set()
    kept = []
    for package in packages:
        documents, size = [], 0
        for key, text in sorted({digest(t): t for t in package.documents}.items()):
            if key not in seen and size + len(text) <= package_bytes:
                documents.append(text)
                size += len(text)
                seen.add(key)
        kept.append(package._replace(documents=documents))
    return kept


# ------------------------------------------------------------------------------------------------- text files


def read_documents(path: Path) -> list[str]:
    """The documents of an .xz file of UTF-8 texts separated by NUL. Raises LedeError when it is not one."""
    try:
        with lzma.open(path) as file:
            return [d for d in file.read().decode().split("\0") if d.strip()]
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise LedeError(f"{path}: expected an .xz file of UTF-8 documents separated by NUL ({error})") from error


def write_documents(path: Path, documents: list[str]) -> dict[str, object]:
    """Write documents as .xz (preset 9: a 64 MiB window finds a package's files again in the shuffle)."""
    data = "\0".join(documents).encode()
    if shutil.which("xz"):
        with path.open("wb") as file:
            subprocess.run(["xz", "-9", "-T2", "-c"], input=data, stdout=file, check=True)
    else:
        path.write_bytes(lzma.compress(data, preset=9))
    return {
        "documents": len(documents),
        "bytes": len(data),
        "compressed_bytes": path.stat().st_size,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def write_split(out: Path, domain: str, documents: list[str]) -> dict[str, object]:
    """Shuffle (seed 0), hold out 1 % by hash, write both parts; what each file holds, for the manifest."""
    documents = sorted(documents, key=digest)
    random.Random(0).shuffle(documents)
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    for text in documents:
        parts["heldout" if digest(text) % 100 == 0 else "train"].append(text)
    names = {part: f"{domain}.{part}.txt.xz" for part in parts}
    compressing = track(parts, f"compressing {domain}")
    return {names[part]: write_documents(out / names[part], parts[part]) for part in compressing}


def build_corpus(out: Path, prose: Path | None = None, megabytes: float = 240.0) -> dict[str, object]:
    """Download the pinned wheels and write the corpus and its manifest.json to `out`.

    prose: an .xz file of UTF-8 documents separated by NUL, or None for Python alone.
    megabytes: at most this much Python text (10^6 bytes) is kept, cut evenly over the packages.
    Raises LedeError when a wheel cannot be downloaded or is not permissively licensed.
    """
    prose_documents = read_documents(prose) if prose else []
    out.mkdir(parents=True, exist_ok=True)
    lines = (line.partition("#")[0].strip() for line in WHEEL_LIST.read_text().splitlines())
    requirements = [line for line in lines if line]
    with ThreadPoolExecutor(8) as pool:
        downloads = pool.map(download, requirements)
        packages = deduplicate(list(track(downloads, "downloading wheels", total=len(requirements))))
    size = sum(len(t) for p in packages for t in p.documents)
    share = min(1.0, megabytes * 1e6 / size)  # documents arrive in hash order: a prefix is an arbitrary fair cut
    packages = [p._replace(documents=p.documents[: math.ceil(share * len(p.documents))]) for p in packages]
    files = write_split(out, "python", [t for p in packages for t in p.documents])
    if prose_documents:
        files |= write_split(out, "prose", sorted({d.strip() + "\n" for d in prose_documents}))
    manifest: dict[str, object] = {
        "packages": [
            {
                "name": p.name,
                "version": p.version,
                "licence": p.licence,
                "files": len(p.documents),
                "bytes": sum(len(t.encode()) for t in p.documents),
            }
            for p in packages
        ],
        "files": files,
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


# --------------------------------------------------------------------------------------------------- tokens


def train_tokenizer(data: Path, vocab_size: int, sample_bytes: int = 15_000_000) -> None:
    """Train byte-level BPE on equal samples of each domain and write data/tokenizer.json.

    Digits are split one by one; `<|endoftext|>` (id 0) is put in front of a prompt.
    sample_bytes: characters taken from each domain.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    def sample() -> Iterator[str]:
        for domain in DOMAINS:
            path = data / f"{domain}.train.txt.xz"
            size = 0
            for text in read_documents(path) if path.exists() else []:
                if size < sample_bytes:
                    size += len(text[:100_000])
                    yield text[:100_000]  # a book is not worth more than a hundred files

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(sample(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, 0)],
    )
    tokenizer.save(str(data / "tokenizer.json"))


def encode(tokenizer_file: Path, texts: list[str]) -> np.ndarray:
    """Token ids of the texts, each after `<|endoftext|>`, in one (N,) uint16 array."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    return np.concatenate([np.asarray(tokenizer.encode(text).ids, dtype=np.uint16) for text in texts])


def tokenise(data: Path) -> None:
    """Encode every training text of `data` that has no .npy newer than tokenizer.json, on all cores."""
    tokenizer_file = data / "tokenizer.json"
    for path in sorted(data.glob("*.train.txt.xz")):
        target = path.with_name(path.name.replace(".txt.xz", ".npy"))
        if target.exists() and target.stat().st_mtime >= tokenizer_file.stat().st_mtime:
            continue
        texts = read_documents(path)
        chunks = [texts[i : i + 200] for i in range(0, len(texts), 200)]
        with multiprocessing.Pool() as pool:
            encoded = pool.imap(partial(encode, tokenizer_file), chunks)
            np.save(target, np.concatenate(list(track(encoded, f"tokenising {path.name}", total=len(chunks)))))


def load_tokens(data: Path) -> dict[str, np.ndarray]:
    """uint16 token streams of the training text by domain. Raises LedeError if there are none."""
    streams = {d: np.load(data / f"{d}.train.npy") for d in DOMAINS if (data / f"{d}.train.npy").exists()}
    if not streams:
        raise LedeError(f"{data}: no *.train.npy; build the corpus there and tokenise it first")
    return streams


def heldout_tokens(data: Path, tokenizer_file: Path) -> dict[str, np.ndarray]:
    """The held-out text by domain as tokens of a model's own tokenizer, which may not be that of `data`.

    Raises LedeError if there is no held-out text.
    """
    paths = {d: data / f"{d}.heldout.txt.xz" for d in DOMAINS}
    texts = {d: read_documents(path) for d, path in paths.items() if path.exists()}
    streams = {d: encode(tokenizer_file, documents) for d, documents in texts.items() if documents}
    if not streams:
        raise LedeError(f"{data}: no held-out text (*.heldout.txt.xz); build it with the corpus command")
    return streams
