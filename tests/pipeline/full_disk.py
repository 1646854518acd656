"""A disk that fills up, becomes read-only or meets its quota: at one write, and at all that follow, of this process.

``install({"folder": ..., "log": ...})`` writes down each write below a folder, one line of JSON (writer, number);
``"fail": [writer, number, errno]`` refuses that one and all later ones. A writer is a file as the run names it: its
temporary names are the same writer. What Rust writes never passes through Python: its two calls are counted instead."""

import builtins
import io
import json
import os
import re
from collections import Counter
from pathlib import Path


def install(asked):
    disk = _Disk(asked)
    for module in (io, builtins):
        module.open = disk.open
    for name in ("replace", "rename", "mkdir"):
        setattr(os, name, disk.checked(getattr(os, name), places=1 if name == "mkdir" else 2))
    _patch_rust(disk)


def _patch_rust(disk):
    import safetensors
    import safetensors.torch
    from transformers import PreTrainedTokenizerFast

    def serialize_file(tensors, filename, *rest, real=safetensors.torch.serialize_file, **more):
        with disk.as_rust(safetensors.SafetensorError, "Error while serializing: I/O error: "):
            disk.check(filename)
        return real(tensors, filename, *rest, **more)

    def _save_pretrained(self, save_directory, *rest, real=PreTrainedTokenizerFast._save_pretrained, **more):
        with disk.as_rust(Exception, ""):
            disk.check(Path(save_directory) / "tokenizer.json")
        return real(self, save_directory, *rest, **more)

    safetensors.torch.serialize_file = serialize_file
    PreTrainedTokenizerFast._save_pretrained = _save_pretrained


class _Disk:
    def __init__(self, asked):
        self.folder, self.log, self.fail = os.path.abspath(asked["folder"]), asked.get("log"), asked.get("fail")
        self.counts, self.full, self.real_open = Counter(), False, io.open
        self.process = os.getpid()

    def writer(self, path):
        """The name that a file has in the folder, without what is temporary in it; None elsewhere."""
        if isinstance(path, int) or not isinstance(path, (str, bytes, os.PathLike)):
            return None
        path = os.path.abspath(os.fsdecode(path))
        if not path.startswith(self.folder + os.sep) or path.endswith(".lock"):
            return None
        name = re.sub(r"(\.\d+)?\.(tmp|part|old)(?=/|$)", "", os.path.relpath(path, self.folder))
        return re.sub(r"checkpoints/last$", "checkpoints/last.ckpt", name)

    def check(self, path):
        writer = self.writer(path)
        if writer is None or os.getpid() != self.process:
            return
        self.counts[writer] += 1
        if self.log is not None:
            with self.real_open(self.log, "a") as file:
                file.write(json.dumps([writer, self.counts[writer]]) + "\n")
        if self.fail is not None:
            name, number, code = self.fail
            self.full |= writer == name and self.counts[writer] == number
            if self.full:
                raise OSError(code, os.strerror(code), str(path))

    def checked(self, real, places):
        def call(*paths, **more):
            self.check(paths[places - 1])
            return real(*paths, **more)

        return call

    def as_rust(self, kind, text):
        class AsRust:
            def __enter__(_):  # noqa: N805
                pass

            def __exit__(_, __, error, ___):  # noqa: N805
                if isinstance(error, OSError):
                    raise kind(f"{text}{error.strerror} (os error {error.errno})") from None

        return AsRust()

    def open(self, file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        if not set(mode) & set("wax+") or self.writer(file) is None:
            return self.real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        self.check(file)
        raw = _File(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        raw.disk = self
        if buffering == 0:
            return raw
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, encoding, errors, newline)
        text.mode = mode
        return text


class _File(io.FileIO):
    """Writes half of what does not fit any more, as a disk does; the error names no file."""

    def write(self, data):
        try:
            self.disk.check(self.name)
        except OSError as error:
            view = memoryview(data).cast("B")
            super().write(view[: len(view) // 2])
            raise OSError(error.errno, error.strerror) from None
        return super().write(data)
