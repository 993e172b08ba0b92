"""Data parallelism over CPU processes, one thread each: on few cores faster than one process with many threads."""

import os
import socket
from collections.abc import Callable

import torch
from torch import distributed, multiprocessing, nn


def _enter(rank: int, world: int, port: int, work: Callable, args: tuple) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=world)
    work(rank, world, *args)
    distributed.destroy_process_group()


def launch(work: Callable, world: int, *args) -> None:
    """Run work(rank, world, *args) in `world` processes that form one gloo group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_enter, (world, port, work, args), nprocs=world)


def average_(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its mean over the processes."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def average_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    average_([parameter.grad for parameter in parameters])


def average_batch_norms(module: nn.Module) -> None:
    """Make every process's running statistics the mean of all."""
    average_([buffer for buffer in module.buffers() if buffer.is_floating_point()])
