"""Multi-token prediction of transformers itself, in a folder as DeepSeek's are laid out."""

import copy
import json
import pathlib
import tempfile
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import transformers
from transformers.modeling_layers import MtpModel

from tests.interop import cases, mtp_cases
from tests.interop.torch_models import DECODERS

LAYERS = DECODERS["deepseek-v3"].num_hidden_layers


def write_seeded(folder: pathlib.Path) -> dict[str, Any]:
    """Writes the folder as DeepSeek's are laid out; returns its config and the shapes of its
    tensors.

    Source of the layout: README_WEIGHTS.md beside the released weights, and their index.
    """
    config = copy.deepcopy(DECODERS["deepseek-v3"])
    config.num_mtp_layers = mtp_cases.DEPTH
    main = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    shapes = {name: list(value.shape) for name, value in _saved(main).items()}
    width, last = config.hidden_size, f"model.layers.{LAYERS - 1}."
    for layer in range(LAYERS, LAYERS + mtp_cases.DEPTH):
        before = f"model.layers.{layer}."
        block = {
            name.replace(last, before): shape
            for name, shape in shapes.items()
            if name.startswith(last)
        }
        shapes |= block | {
            f"{before}{norm}.weight": [width] for norm in ("enorm", "hnorm", "shared_head.norm")
        }
        shapes[f"{before}eh_proj.weight"] = [width, 2 * width]
        shapes |= {f"{before}{copy}": shapes[name] for copy, name in mtp_cases.COPIES.items()}
    shapes = dict(sorted(shapes.items()))
    main.save_pretrained(folder)
    safetensors.numpy.save_file(
        mtp_cases.weights(shapes), folder / "model.safetensors", metadata={"format": "pt"}
    )
    return {"config": json.loads((folder / "config.json").read_text()), "tensors": shapes}


def load(folder: pathlib.Path) -> tuple[transformers.PreTrainedModel, MtpModel]:
    """Returns the model of a folder and its predictors, once nothing in it is missing or left
    over.
    """
    main, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"], report["missing_keys"]
    further = tuple(f"model.layers.{layer}." for layer in range(LAYERS, LAYERS + mtp_cases.DEPTH))
    assert all(name.startswith(further) for name in report["unexpected_keys"]), report[
        "unexpected_keys"
    ]
    # The class knows the number of the released model's; this one has fewer layers.
    main._keys_to_ignore_on_load_unexpected = [
        r"model\.layers\.[" + "".join(name[-2] for name in further) + r"]\."
    ]
    return main.eval(), MtpModel.from_pretrained(main).eval()


def compute(
    main: transformers.PreTrainedModel, mtp: MtpModel
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Returns the logits of each depth, and the gradient of the loss of DeepSeek-V3's equations 24
    and 25.

    Gradients have the names of the tensors, but for those that stand in a file twice.
    """
    tokens = torch.from_numpy(cases.tokens()).long()
    given, targets = tokens[:, :-1], tokens[:, 1:]
    states = main.model(given).last_hidden_state
    loss = _summed(main.lm_head(states), targets)
    positions = torch.arange(given.shape[1])[None]
    found = []
    for depth in range(1, mtp_cases.DEPTH + 1):
        # At each place the state that has seen it and the `depth` tokens after it.
        following = targets[:, depth - 1 : -1]
        states = mtp.forward_layer(
            depth - 1, states[:, :-1], positions[:, depth:], None, input_ids=following
        )
        found.append(mtp.shared_head(states))
        loss = loss + mtp_cases.WEIGHT / mtp_cases.DEPTH * _summed(found[-1], targets[:, depth:])
    (loss / targets.numel()).backward()
    return [logits.detach().numpy() for logits in found], _gradients(main, mtp)


def _summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum"
    )


@torch.no_grad()
def _gradients(main: transformers.PreTrainedModel, mtp: MtpModel) -> dict[str, np.ndarray]:
    """Returns gradients by the names in the folder; transformers itself takes its fused tensors
    apart.

    It does so with those of a predictor's block in the place of the last layer's.
    """
    gradients = {name: value.grad for name, value in main.named_parameters()}
    for buffer in main.buffers():
        buffer.zero_()
    for name, value in main.named_parameters():
        value.copy_(gradients[name])
    found, last = _saved(main), f"model.layers.{LAYERS - 1}."
    for number, layer in enumerate(mtp.layers, LAYERS):
        block = dict(layer.mtp_block.named_parameters())
        for name, value in main.model.layers[-1].named_parameters():
            value.copy_(block[name].grad)
        before = f"model.layers.{number}."
        found |= {
            name.replace(last, before): value
            for name, value in _saved(main).items()
            if name.startswith(last)
        }
        own = {name: getattr(layer, name) for name in ("enorm", "hnorm", "eh_proj")}
        own["shared_head.norm"] = layer.post_norm
        found |= {
            f"{before}{name}.weight": module.weight.grad.numpy() for name, module in own.items()
        }
    return found


def _saved(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """Returns the tensors that a model is saved with."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return safetensors.numpy.load_file(f"{folder}/model.safetensors")
