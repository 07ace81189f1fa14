"""Bytes that a device sends in a training step, by the formula of each kind of parallelism.

With n devices an all-gather and a reduce-scatter of an array send (n − 1) / n of it, an all-reduce
twice that, and a permute all that it is given. Source: Thakur et al. 2005,
doi.org/10.1177/1094342005051521, sections 4.1 to 4.5.
"""


def others(devices: int) -> float:
    """Returns the share of an array that lies on the other devices."""
    return (devices - 1) / devices


def data(devices: int, gradients: float) -> float:
    """Returns the bytes of replicas: one all-reduce of all gradients."""
    return 2 * others(devices) * gradients


def zero_1(devices: int, gradients: float, parameters: float) -> float:
    """Returns the bytes where the optimizer's state is sharded.

    Every device has all gradients, an all-reduce, and updates its part of the parameters, which the
    others gather.
    """
    return others(devices) * (2 * gradients + parameters)


def zero_2(devices: int, gradients: float, parameters: float) -> float:
    """Returns the bytes where gradients are sharded too: they are reduce-scattered.

    Source: Rajbhandari et al. 2019 (ZeRO), arXiv:1910.02054, section 7.1.
    """
    return others(devices) * (gradients + parameters)


def zero_3(devices: int, gathered_layers: float, gathered_others: float, gradients: float) -> float:
    """Returns the bytes where parameters are sharded too.

    A layer's parameters are gathered before its forward pass and again before its backward pass;
    the embedding and the output projection are used once a step. All gradients are
    reduce-scattered. Source: arXiv:1910.02054, section 7.2.

    Args:
      devices: n.
      gathered_layers: bytes of the layers' parameters in the type that they are gathered in.
      gathered_others: of all other parameters.
      gradients: bytes of all gradients.
    """
    return others(devices) * (2 * gathered_layers + gathered_others + gradients)


def tensor(devices: int, layers: int, hidden: float) -> float:
    """Returns the bytes where heads, MLP width and vocabulary are sharded.

    A layer sums hidden states over the devices after attention and after the MLP, and their
    gradients before both. The embedding sums once, and so does the gradient of the output
    projection's input. An all-reduce each, or an all-gather and a reduce-scatter, which send as
    much. Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3; Korthikanti et al. 2022,
    arXiv:2205.05198, section 4.2.2.

    Args:
      devices: n.
      layers: L.
      hidden: bytes of the hidden states of all tokens.
    """
    all_reduce = 2 * others(devices) * hidden
    return (4 * layers + 2) * all_reduce


def ring(devices: int, layers: int, queries: float, keys: float) -> float:
    """Returns the bytes of ring attention with balanced tokens.

    Keys and values go to n − 1 other devices forward, and again backward, where their gradients
    make n steps, the last of them home. Balance brings queries, keys, values and outputs to other
    devices, and their gradients back. Source: Liu et al. 2023, arXiv:2310.01889, algorithm 1.

    Args:
      devices: n.
      layers: L.
      queries: bytes of a device's queries, and of its outputs.
      keys: bytes of a device's keys, and of its values.
    """
    forward = devices - 1
    backward = forward + devices
    travelling = (forward + backward) * 2 * keys
    balanced = 2 * (2 * queries + 2 * keys)
    return layers * (travelling + balanced)


def gathered_keys(devices: int, layers: int, keys: float) -> float:
    """Returns the bytes where every device gets all keys and values, and their gradients are
    reduce-scattered.

    Args:
      devices, layers, keys: as of `ring`.
    """
    forward = 2 * (devices - 1) * keys
    backward = forward
    return layers * (forward + backward)


def heads_for_tokens(devices: int, layers: int, queries: float, keys: float) -> float:
    """Returns the bytes of an all-to-all of queries, keys, values and outputs, and of their
    gradients.

    Source: Jacobs et al. 2023 (DeepSpeed Ulysses), arXiv:2309.14509, section 3.2.

    Args:
      devices, layers, queries, keys: as of `ring`.
    """
    arrays = 2 * queries + 2 * keys
    return 2 * layers * others(devices) * arrays


def expert(devices: int, layers: int, choices: float) -> float:
    """Returns the bytes of tokens that are sent to their experts and back, and of both gradients,
    under an even load.

    Source: Lepikhin et al. 2020 (GShard), arXiv:2006.16668, section 3.2.

    Args:
      devices: n.
      layers: L, with experts.
      choices: bytes of the rows that a device's tokens choose experts for.
    """
    return 4 * layers * others(devices) * choices


def pipeline(microbatches: int, chunks: int, hidden: float) -> float:
    """Returns the bytes of a stage between two others: each microbatch's hidden states once to the
    next stage, and their gradients to the one before.

    Source: Narayanan et al. 2021, arXiv:2104.04473, section 3.2.

    Args:
      microbatches: M.
      chunks: stages of a device, V.
      hidden: bytes of a microbatch's hidden states.
    """
    return 2 * microbatches * chunks * hidden


def bubble(
    schedule: str, devices: int, microbatches: int, chunks: int, costs: tuple[float, float, float]
) -> float:
    """Returns the share of a step in which a device of a pipeline waits.

    Waiting over waiting and work, with P devices and M microbatches: devices wait
    (P − 1)(f + b + w) / V, or (P − 1)(f + b − w) with `zero_bubble`, and work M (f + b + w).
    Source: Narayanan et al. 2021, arXiv:2104.04473, sections 2.2.1 and 2.2.2; Qi et al. 2023,
    arXiv:2401.10241, section 2.3.

    Args:
      schedule: of `pipeline_schedule.Name`.
      devices, microbatches, chunks: P, M and V.
      costs: f, b and w: the times of a forward pass and of both parts of a backward pass.
    """
    forward, input_gradient, weight_gradient = costs
    step = forward + input_gradient + weight_gradient
    waiting = (devices - 1) * step / chunks
    if schedule == "zero_bubble":
        waiting = (devices - 1) * (forward + input_gradient - weight_gradient)
    return waiting / (waiting + microbatches * step)
