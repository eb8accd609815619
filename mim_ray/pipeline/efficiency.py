"""The cells of the paper's Table 6: a training step or a prediction in one of four modes, its FLOPs and its peak memory.

Base; +MIM, whose MM embeddings lie ready (the representation center); +MIM whose frozen encoders embed the target and every
behavior of every sample; and end to end, where the CTR loss also trains the encoders. Weights and data are random: neither
changes what a step costs.
"""

from __future__ import annotations

import os
import resource
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from mim_ray.ciubm.batch import EmbeddedBatch
from mim_ray.ciubm.model import CtrNetwork
from mim_ray.ciubm.recipe import network_config
from mim_ray.config import Scenario
from mim_ray.encoders.item_encoder import ItemEncoder
from mim_ray.encoders.tokenizer import train_tokenizer
from mim_ray.errors import ConfigError

Mode = Literal["base", "mim", "no_center", "end_to_end"]
Phase = Literal["train", "inference"]
MODES: Sequence[Mode] = ("base", "mim", "no_center", "end_to_end")
PHASES: Sequence[Phase] = ("train", "inference")
_FLOPS_ROWS = 2
MEGABYTE = 2**20
TITLES = {
    "base": "base",
    "mim": "+MIM",
    "no_center": "+MIM without the representation center",
    "end_to_end": "+MIM end to end",
}


@dataclass(frozen=True)
class Case:
    """What a mode is made of. The network's width, behaviors and modules are the scenario's."""

    scenario: Scenario
    backbone: str
    mode: Mode
    device: str

    def build(self) -> Step:
        """The networks with random weights."""
        torch.manual_seed(0)
        settings = self.scenario.ciubm
        width = None if self.mode == "base" else self.scenario.encoders.width
        network = CtrNetwork(network_config(settings, self.backbone, width)).to(self.device)
        encoder = None
        if self.mode in ("no_center", "end_to_end"):
            titles = [f"a title of item number {number}" for number in range(200)]
            tokenizer = train_tokenizer(titles, self.scenario.encoders.text.vocabulary_size)
            encoder = ItemEncoder.build(self.scenario.encoders, tokenizer, seed=0).to(self.device)
            encoder.requires_grad_(self.mode == "end_to_end")
        return Step(network, encoder, settings.max_behaviors)


class Step:
    """A CTR network, with the encoders beside it where they run for every sample."""

    def __init__(self, network: CtrNetwork, encoder: ItemEncoder | None, num_behaviors: int) -> None:
        self.network, self.encoder, self.num_behaviors = network, encoder, num_behaviors
        trained = [*network.parameters(), *(encoder.parameters() if encoder is not None else ())]
        self._optimizer = torch.optim.Adam([weight for weight in trained if weight.requires_grad], lr=1e-3)
        self._device = next(network.parameters()).device

    def inputs(self, num_rows: int) -> tuple[EmbeddedBatch, Tensor | None]:
        """Embedded rows of full length, and pictures of their B · (1 + L) items where the encoders run."""
        config, length, device = self.network.config, self.num_behaviors, self._device

        def vectors(width: int | None, *, each: bool = False) -> Tensor | None:
            shape = (num_rows, length, width) if each else (num_rows, width)
            return torch.randn(*shape, device=device) if width else None

        ready = config.content_width if self.encoder is None else None
        batch = EmbeddedBatch(
            target=torch.randn(num_rows, config.id_width, device=device, requires_grad=True),
            behaviors=torch.randn(num_rows, length, config.id_width, device=device, requires_grad=True),
            behavior_mask=torch.ones(num_rows, length, dtype=torch.bool, device=device),
            same_category=torch.ones(num_rows, length, dtype=torch.bool, device=device),
            user=vectors(config.user_width),
            target_mm=vectors(ready),
            behavior_mm=vectors(ready, each=True),
            behavior_age_s=torch.ones(num_rows, length, device=device),
            context=vectors(config.context_width),
            query_mm=vectors(config.query_width or (config.content_width if config.query_interest else None)),
            behavior_cross=vectors(config.cross_width, each=True),
        )
        if self.encoder is None:
            return batch, None
        side = self.encoder.image_size
        return batch, torch.zeros(num_rows * (1 + length), 3, side, side, dtype=torch.uint8, device=device)

    def train(self, batch: EmbeddedBatch, pixels: Tensor | None) -> None:
        """Forward, backward, and the optimizer's step; ID embeddings get gradients, tables are not here."""
        self.network.train()
        self._optimizer.zero_grad()
        label = torch.zeros(len(batch.target), device=self._device)
        self.network.loss(self._with_content(batch, pixels), label)[0].backward()
        self._optimizer.step()

    @torch.no_grad()
    def inference(self, batch: EmbeddedBatch, pixels: Tensor | None) -> None:
        """Logits."""
        self.network.eval()
        self.network(self._with_content(batch, pixels))

    def _with_content(self, batch: EmbeddedBatch, pixels: Tensor | None) -> EmbeddedBatch:
        if self.encoder is None or pixels is None:
            return batch
        trained = next(self.encoder.parameters()).requires_grad and torch.is_grad_enabled()
        self.encoder.train(trained)
        num_items = len(pixels)
        text = self.encoder.text
        title = "title " * text.max_tokens  # as long as titles may be
        tokens = {key: value.to(self._device).expand(num_items, -1) for key, value in text.tokenize([title]).items()}
        present = torch.ones(num_items, dtype=torch.bool, device=self._device)
        items = self.encoder(pixels, present, tokens, present).mm.unflatten(0, (len(batch.target), -1))  # (B, 1 + L, D)
        return batch._replace(target_mm=items[:, 0], behavior_mm=items[:, 1:])


def measure(scenario: Scenario, backbone: str, batch: int, device: str, threads: int) -> dict[str, Any]:
    """All cells of the table, and the ratios."""
    rows: dict[str, Any] = {}
    for mode in MODES:
        case = Case(scenario, backbone, mode, device)
        rows[mode] = {
            "gflops": {phase: flops_per_sample(case, phase) / 1e9 for phase in PHASES},
            "peak_mb": {phase: peak_memory(case, phase, batch, threads) / MEGABYTE for phase in PHASES},
        }
    ratio = {phase: rows["mim"]["gflops"][phase] / rows["base"]["gflops"][phase] for phase in PHASES}
    return {
        "scenario": scenario.name,
        "backbone": backbone,
        "num_behaviors": scenario.ciubm.max_behaviors,
        "content_width": scenario.encoders.width,
        "memory_batch": batch,
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "rows": rows,
        "mim_over_base_flops": {phase: round(value, 4) for phase, value in ratio.items()},
    }


def flops_per_sample(case: Case, phase: Phase) -> float:
    """Multiplications and additions of matrix products and convolutions, by PyTorch's counter, of one row.

    Attention runs as plain products meanwhile, which the counter knows on every device.
    """
    step = case.build()
    inputs = step.inputs(_FLOPS_ROWS)
    known = {torch.ops.aten.convolution_backward: _convolution_backward}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=known) as counter:
        getattr(step, phase)(*inputs)
    return counter.get_total_flops() / _FLOPS_ROWS


def _convolution_backward(
    grad: list[int], pixels: list[int], weight: list[int], *rest: Any, out_shape: Any = None
) -> int:
    """As much as the forward pass for each of the two gradients asked for. PyTorch's formula leaves out that channels are
    grouped, and so gives depthwise convolutions (ConvNeXt) a multiple."""
    transposed, output_mask = rest[4], rest[7]
    return conv_flop_count(pixels, weight, grad, transposed=transposed) * (output_mask[0] + output_mask[1])


def peak_memory(case: Case, phase: Phase, num_rows: int, threads: int) -> int:
    """Bytes of weights, optimizer, inputs and work at the highest point of two steps.

    On a GPU what torch allocated; on a CPU what a process of its own holds beyond what it had before the networks.
    """
    if case.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _two_steps(case, phase, num_rows)
        return torch.cuda.max_memory_allocated() - before
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(threads)
            before = _resident_bytes()
            _two_steps(case, phase, num_rows)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            os.write(write, str(peak - before).encode())
            os._exit(0)
        finally:  # reached with an error only: the child must not go on as a second parent
            traceback.print_exc()
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise ConfigError(
            f"Measuring {phase} of {case.mode} with {num_rows} rows ended with status {status} (9: out of memory). "
            "Give a smaller --batch."
        )
    return max(0, int(text))


def _two_steps(case: Case, phase: Phase, num_rows: int) -> None:
    """The second one has the optimizer's state that the first one made."""
    step = case.build()
    inputs = step.inputs(num_rows)
    for _ in range(2):
        getattr(step, phase)(*inputs)


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
