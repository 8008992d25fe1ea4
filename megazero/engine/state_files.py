"""Masters and optimizer states on NVMe: read before a bucket's update, written after it, both beside other buckets'.

    read ahead k+1  ║  update k  ║  write k-1

Between updates a state is a placeholder without elements; its file is named by bucket, cut and key.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from megazero.base.errors import ConfigError, OffloadError
from megazero.zero.buckets import Bucket
from megazero.zero.homes import FileTensor, Transfer


class CutLike(Protocol):
    """What is asked of a cut (engine/cuts.py)."""

    @property
    def bucket(self) -> Bucket: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def flat(self) -> nn.Parameter: ...
    def part_of(self, owned: Tensor) -> Tensor: ...


@dataclass
class _Loaded:
    """One bucket's state in memory, or on its way there."""

    master: Tensor | None = None
    states: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """By cut's start and key."""
    transfers: list[Transfer] = field(default_factory=list)
    borrowed: list[tuple[FileTensor, Tensor]] = field(default_factory=list)


class StateFiles:
    """The files of one rank's buckets."""

    def __init__(self) -> None:
        self._files: dict[tuple[int, int, str], FileTensor] = {}
        self._loaded: dict[int, _Loaded] = {}
        self._writing: list[_Loaded] = []

    def prefetch(self, bucket: Bucket, cuts: Sequence[CutLike], optimizer: torch.optim.Optimizer) -> None:
        """Start reading what a bucket's update needs."""
        if id(bucket) in self._loaded:
            return
        loaded = self._loaded[id(bucket)] = _Loaded()
        file = bucket.master_file or bucket.master_shard_file
        if file is not None:
            loaded.master = self._read(file, loaded)
        for cut in cuts:
            for key in optimizer.state.get(cut.flat, {}):
                if (state_file := self._files.get((id(bucket), cut.start, key))) is not None:
                    loaded.states[cut.start, key] = self._read(state_file, loaded)

    def _read(self, file: FileTensor, loaded: _Loaded) -> Tensor:
        buffer = file.buffer()
        loaded.transfers.append(file.read(buffer))
        loaded.borrowed.append((file, buffer))
        return buffer

    def fetch(self, bucket: Bucket, cuts: Sequence[CutLike], optimizer: torch.optim.Optimizer) -> None:
        """Have them in memory, where the optimizer finds them."""
        self.prefetch(bucket, cuts, optimizer)
        loaded = self._loaded[id(bucket)]
        for transfer in loaded.transfers:
            transfer.wait()
        for cut in cuts:
            if loaded.master is not None:
                cut.flat.data = cut.part_of(loaded.master)
            for (start, key), tensor in loaded.states.items():
                if start == cut.start:
                    optimizer.state[cut.flat][key] = tensor

    def master(self, bucket: Bucket) -> Tensor | None:
        """The fetched master; None when the bucket has it in memory anyway."""
        loaded = self._loaded.get(id(bucket))
        return None if loaded is None else loaded.master

    def put(self, bucket: Bucket, cuts: Sequence[CutLike], optimizer: torch.optim.Optimizer, *, wait: bool) -> None:
        """Start writing a bucket's updated state. At most one other bucket's is on its way."""
        self.settle()
        loaded = self._loaded.pop(id(bucket), _Loaded())
        writing = _Loaded(borrowed=loaded.borrowed)
        self._writing.append(writing)
        if loaded.master is not None:
            if bucket.master_file is not None:
                writing.transfers.append(bucket.master_file.write(loaded.master))
            for cut in cuts:
                cut.flat.data = torch.empty(0)
        if bucket.place.state_store is not None:
            for cut in cuts:
                self._put_states(cut, optimizer, writing)
        if wait:
            self.settle()

    def _put_states(self, cut: CutLike, optimizer: torch.optim.Optimizer, writing: _Loaded) -> None:
        store = cut.bucket.place.state_store
        assert store is not None
        for key, tensor in optimizer.state[cut.flat].items():
            if not isinstance(tensor, Tensor) or tensor.dim() == 0 or not tensor.numel():
                continue
            if type(tensor) is not Tensor:
                raise ConfigError(
                    f"the state {key!r} of {type(optimizer).__name__} is a {type(tensor).__name__}, which cannot go to "
                    "NVMe. Use AdamW, whose state may, or keep the 8-bit one in memory: offload_optimizer cpu or none."
                )
            address = (id(cut.bucket), cut.start, key)
            if address not in self._files or self._files[address].numel != tensor.numel():  # the cut was divided
                name = f"{cut.bucket.placed[0].name}.{cut.start}.{key}"
                self._files[address] = FileTensor(store, name, tensor.numel(), tensor.dtype)
            writing.states[cut.start, key] = tensor  # alive until it is written
            writing.transfers.append(self._files[address].write(tensor))
            optimizer.state[cut.flat][key] = tensor.new_empty(0)

    def settle(self) -> None:
        """Wait for what is being written, and give its memory back. Raises OffloadError when it could not be."""
        while self._writing:
            self._end(self._writing.pop())

    def forget(self) -> None:
        """What an update that ended with an error has left on its way, read or written, whether or not it arrives."""
        for loaded in [*self._loaded.values(), *self._writing]:
            with suppress(OffloadError):  # whoever waited first was told
                self._end(loaded)
        self._loaded, self._writing = {}, []

    def _end(self, moved: _Loaded) -> None:
        for transfer in moved.transfers:
            transfer.finish()
        for file, buffer in moved.borrowed:
            file.release(buffer)
        for transfer in moved.transfers:
            transfer.wait()

    def mapped(self, cut: CutLike, key: str, value: Tensor) -> Tensor:
        """A state for a checkpoint: itself, or its file as memory."""
        file = self._files.get((id(cut.bucket), cut.start, key))
        return value if file is None or value.numel() else file.mapped()
