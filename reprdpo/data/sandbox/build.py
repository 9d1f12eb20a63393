"""The sandbox on disk: what is missing is built, what is there is used."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from reprdpo.data.sandbox import corpus
from reprdpo.data.sandbox.base_model import BaseConfig, pretrain
from reprdpo.data.sandbox.corpus import CorpusConfig, CorpusSize
from reprdpo.data.sandbox.tokenizer import build_tokenizer
from reprdpo.data.sandbox.world import Kind, SandboxWorld, build_world
from reprdpo.errors import UserError
from reprdpo.files import content_hash, disk_errors, write_jsonl

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Sandbox:
    """Where everything of one sandbox lies: a transformers folder and JSONL files.

    ``preferences`` and the prompt files are of the library's schema; ``sft`` and ``benign_text`` hold ``prompt`` and
    ``response``; ``held_out`` are preferences over harmful prompts that no training file has.
    """

    model_dir: Path
    preferences: Path
    sft: Path
    train_prompts: Path
    harmful_prompts: Path
    borderline_prompts: Path
    benign_prompts: Path
    benign_text: Path
    held_out: Path


@dataclass(frozen=True)
class Scale:
    """How large a sandbox is: its texts and its base model."""

    size: CorpusSize
    base: BaseConfig
    corpus: CorpusConfig = field(default_factory=CorpusConfig)


SCALES = {
    "demo": Scale(
        CorpusSize(
            documents=20000,
            pairs=960,
            sft=320,
            train_prompts=480,
            harmful_prompts=220,
            borderline_prompts=110,
            benign_prompts=110,
            benign_texts=220,
        ),
        BaseConfig(),
    ),
    "tiny": Scale(
        CorpusSize(
            documents=480,
            pairs=48,
            sft=24,
            train_prompts=16,
            harmful_prompts=22,
            borderline_prompts=11,
            benign_prompts=11,
            benign_texts=12,
        ),
        BaseConfig(hidden_size=32, layers=3, heads=2, intermediate_size=64, batch_size=8, learning_rate=1e-2),
    ),
}


def load_sandbox(
    cache_dir: str | Path, *, seed: int = 0, scale: Literal["demo", "tiny"] = "demo", progress: bool = True
) -> Sandbox:
    """The sandbox drawn by ``seed``, under ``cache_dir``; builds what is missing, for the demo in a minute or two.

    Texts and model each lie under a hash of all they are made from, and appear whole or not at all: stopped at any
    moment, the next call builds what is not there yet.

    Raises:
        UserError: no such scale, or a cache folder that cannot be written.
    """
    if scale not in SCALES:
        raise UserError(f"scale {scale!r}: no such sandbox; choose one of {', '.join(SCALES)}")
    recipe, world = SCALES[scale], build_world(seed)
    tables = _tables(world, recipe)
    documents = corpus.pretraining_documents(world, recipe.size, recipe.corpus)
    vocabulary = sorted({*chain.from_iterable(documents), *_strings(tables)})
    tables_dir = Path(cache_dir) / f"sandbox-{scale}-texts-{content_hash(tables)}"
    model_dir = (
        Path(cache_dir) / f"sandbox-{scale}-base-{content_hash(seed, documents, vocabulary, asdict(recipe.base))}"
    )
    held_out = corpus.test_preference_rows(world, recipe.size.harmful_prompts)
    held_out_dir = Path(cache_dir) / f"sandbox-{scale}-pairs-{content_hash(held_out)}"
    _write_tables(tables_dir, tables)
    if not model_dir.is_dir():
        tokenizer = build_tokenizer(vocabulary)
        model = pretrain(documents, tokenizer, recipe.base, seed=seed, progress=progress)
        with _whole_folder(model_dir) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    _write_tables(held_out_dir, {"held_out": held_out})
    paths = {name: tables_dir / f"{name}.jsonl" for name in tables}
    return Sandbox(model_dir=model_dir, held_out=held_out_dir / "held_out.jsonl", **paths)


def _write_tables(folder: Path, tables: dict[str, Rows]) -> None:
    if not folder.is_dir():
        with _whole_folder(folder) as unfinished:
            for name, rows in tables.items():
                write_jsonl(unfinished / f"{name}.jsonl", rows)


def _tables(world: SandboxWorld, recipe: Scale) -> dict[str, Rows]:
    size = recipe.size
    preferences = corpus.preference_rows(world, size, recipe.corpus)
    return {
        "preferences": preferences,
        "sft": corpus.sft_rows(preferences, size),
        "train_prompts": corpus.train_prompt_rows(world, size),
        "harmful_prompts": corpus.test_prompt_rows(world, Kind.HARMFUL, size.harmful_prompts),
        "borderline_prompts": corpus.test_prompt_rows(world, Kind.BORDERLINE, size.borderline_prompts),
        "benign_prompts": corpus.test_prompt_rows(world, Kind.BENIGN, size.benign_prompts),
        "benign_text": corpus.benign_text_rows(world, size),
    }


def _strings(tables: dict[str, Rows]) -> Iterator[str]:
    for row in chain.from_iterable(tables.values()):
        yield from (row[field] for field in ("prompt", "response", "chosen", "rejected") if field in row)


@contextlib.contextmanager
def _whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; rename it into place when the block ends well.

    Where another process was faster its folder stays: both hold the same content.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with disk_errors(path):
            yield folder
            folder.chmod(0o755)
            if not path.is_dir():
                folder.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
