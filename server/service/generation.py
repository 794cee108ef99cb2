"""Writing: a decoder goes on with many texts at once, each by its own adapter; they join and leave at any step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lora.errors import DataError, LetheError
from lora.model import AdaptedModel
from server.service.answers import Provenance
from server.service.decoding import Decoding
from server.service.queue import Work
from server.service.warm import WarmSlots
from tasks.models import BaseModel

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class WriteAsked:
    """A prompt for one adapter (None: the base model), and how it is gone on with."""

    adapter: str | None
    prompt: str
    most: int = 16
    """Tokens that are written at most."""
    temperature: float = 0.0
    """0 takes the likeliest token; else tokens are drawn."""
    top_p: float = 1.0
    """Drawn among the likeliest tokens that have this share together."""
    seed: int | None = None
    """Equal seeds draw equal tokens; None draws anew."""
    stop: tuple[str, ...] = ()
    """Texts at which writing ends; they are left out."""
    listener: Callable[[str], None] | None = None
    """Called, in the engine's thread, with every piece of text that is sure to stay."""


@dataclass(frozen=True)
class Written:
    """What was written, and why it ended: `stop` (a stop text or the model's own end) or `length`."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish: Finish
    provenance: Provenance


@dataclass
class _Row:
    """One text in the middle of writing."""

    work: "Work[WriteAsked]"
    provenance: Provenance
    prompt_tokens: int
    source: torch.Generator
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    sent: int = 0
    finish: Finish | None = None

    @property
    def asked(self) -> WriteAsked:
        return self.work.asked


class Writing:
    """A `Worker` that decodes one token a step for all rows that run, and takes new ones in between.

    A row's slot is copied when it joins: it ends with the version that it began with. Which rows share a step changes
    no row's logits beyond rounding. Slots hold what `AdaptedModel.bound` takes.
    """

    def __init__(
        self, base: BaseModel, adapted: AdaptedModel, warm: WarmSlots, *, rows: int = 32, longest: int | None = None
    ) -> None:
        self.base, self.warm = base, warm
        self.longest = longest or base.positions or 2048
        self._rows: list[_Row] = []
        self._decoding = Decoding(base, adapted, warm.turned, rows=rows)
        self._ends = _ends(base)
        self._next = torch.zeros(0, dtype=torch.int64)

    @property
    def running(self) -> int:
        """Texts that are being written."""
        return len(self._rows)

    @torch.no_grad()
    def step(self, new: Sequence["Work[WriteAsked]"]) -> None:
        """Let texts join, or else add a token to each; those that are over leave."""
        waited = [work for work in new if not work.over]
        if self._rows:
            self._leave()
        if self._rows:
            self._take(self._decoding.step(self._next), self._rows)
        if waited:
            self._join(waited)
        self._leave()

    def give_up(self, error: BaseException) -> None:
        """End all texts with an error."""
        for row in self._rows:
            row.work.tell(error)
        self._leave()

    # --- Joining and leaving ---

    def _join(self, new: Sequence["Work[WriteAsked]"]) -> None:
        prompts: list[Tensor] = []
        keep: list[int] = []
        rows: list[_Row] = []
        with self.warm.lent([work.asked.adapter for work in new]) as lent:
            for place, (work, version) in enumerate(zip(new, lent.versions, strict=True)):
                ids = self._ids(work.asked)
                error = version if isinstance(version, LetheError) else self._too_long(work.asked, ids)
                if error is not None:
                    work.tell(error)
                elif not isinstance(version, LetheError):
                    keep.append(place)
                    prompts.append(ids)
                    provenance = Provenance.of(work.asked.adapter, version)
                    rows.append(_Row(work, provenance, len(ids), _source(work.asked)))
            self._decoding.copy(lent.part(keep))
        if rows:
            logits = self._decoding.join(prompts)
            self._rows += rows
            self._take(logits, rows)

    def _ids(self, asked: WriteAsked) -> Tensor:
        ids = self.base.tokenizer(asked.prompt, return_attention_mask=False, verbose=False)["input_ids"]
        start = self.base.tokenizer.bos_token_id
        return torch.tensor(ids or [start if start is not None else 0], dtype=torch.int64)

    def _too_long(self, asked: WriteAsked, ids: Tensor) -> DataError | None:
        if len(ids) + asked.most <= self.longest:
            return None
        return DataError(
            f"prompt of {len(ids)} tokens and max_tokens={asked.most} are more than the {self.longest} that the model "
            "takes; shorten either"
        )

    def _leave(self) -> None:
        keep = [place for place, row in enumerate(self._rows) if not row.work.over]
        if len(keep) < len(self._rows):
            self._decoding.keep(keep)
            self._rows = [self._rows[place] for place in keep]
            self._next = self._next[torch.tensor(keep, dtype=torch.int64)]

    # --- Tokens ---

    def _take(self, logits: Tensor, rows: Sequence[_Row]) -> None:
        """Choose the next token of every row and note it; rows that are over get their answer."""
        chosen = [_chosen(each, row) for each, row in zip(logits, rows, strict=True)]
        own = torch.tensor(chosen, dtype=torch.int64)
        joined = len(rows) < len(self._rows) or len(self._next) < len(self._rows)
        self._next = torch.cat([self._next, own]) if joined else own
        for row, token in zip(rows, chosen, strict=True):
            self._note(row, token)
            if row.finish is not None:
                row.work.tell(Written(row.text, tuple(row.tokens), row.prompt_tokens, row.finish, row.provenance))

    def _note(self, row: _Row, token: int) -> None:
        if token in self._ends:
            row.finish = "stop"
        else:
            row.tokens.append(token)
            if len(row.tokens) == row.asked.most:
                row.finish = "length"
        row.text = self.base.tokenizer.decode(row.tokens)
        found = [at for text in row.asked.stop if (at := row.text.find(text)) >= 0]
        if found:
            row.text, row.finish = row.text[: min(found)], "stop"
        self._tell(row)

    def _tell(self, row: _Row) -> None:
        """Hand out the text that later tokens cannot change: no half characters, nothing that may begin a stop text."""
        if row.asked.listener is None or row.work.over:
            return
        sure = len(row.text)
        if row.finish is None:
            sure -= len(row.text) - len(row.text.rstrip("\ufffd"))
            sure -= max((_overlap(row.text[:sure], text) for text in row.asked.stop), default=0)
        if sure > row.sent:
            row.asked.listener(row.text[row.sent : sure])
            row.sent = sure


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop text."""
    return max((size for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)


def _ends(base: BaseModel) -> frozenset[int]:
    """Return the tokens that end a text, by the tokenizer and by the model's own settings."""
    config: Any = base.model.config
    found = [base.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
    flat = [token for each in found for token in (each if isinstance(each, list) else [each])]
    return frozenset(int(token) for token in flat if token is not None)


def _source(asked: WriteAsked) -> torch.Generator:
    source = torch.Generator()
    if asked.seed is None:
        source.seed()
    else:
        source.manual_seed(asked.seed)
    return source


def _chosen(logits: Tensor, row: _Row) -> int:
    """Choose a token of `logits [V]`: the likeliest, or one drawn by the row's own source."""
    asked = row.asked
    if asked.temperature <= 0:
        return int(logits.argmax())
    shares = torch.softmax(logits.double() / asked.temperature, dim=0)
    if asked.top_p < 1:
        ordered, places = shares.sort(descending=True)
        beyond = ordered.cumsum(0) - ordered >= asked.top_p
        shares = shares.index_fill(0, places[beyond], 0.0)
    # Searched in the cumulative sum rather than by torch.multinomial: a draw then moves only where shares do.
    total = shares.cumsum(0)
    drawn = torch.rand((), generator=row.source, dtype=torch.float64) * total[-1]
    return int(torch.searchsorted(total, drawn, right=True).clamp(max=len(total) - 1))
