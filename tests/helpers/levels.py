"""What Tyr-the-Pruner and EvoPress write: matrices at several levels, and the list of those that were chosen."""

import torch

O_PROJ, DOWN_PROJ = "self_attn.o_proj", "mlp.down_proj"


def write_levels(directory, model, choice, zero_columns, name="tiny-0.5.txt"):
    """Matrices that were solved for anew, at the chosen level and others; makes them those of the model.

    Args:
        choice: the level of every module.
        zero_columns: of the module at that level.
    """
    generator = torch.Generator().manual_seed(11)
    for module, level in choice.items():
        weight = model.get_submodule(module).weight
        solved = torch.randn(weight.shape, generator=generator) * 0.15
        (directory / module).mkdir(parents=True)
        for other in range(-2, 3):
            torch.save((solved * (other + 5)).bfloat16(), directory / module / f"{other}.pth")
        solved[:, zero_columns.get(module, [])] = 0
        torch.save(solved.bfloat16(), directory / module / f"{level}.pth")
        weight.copy_(solved.bfloat16())
    torch.save({"sparsity": 0.5, "num_sparsity_levels": 9}, directory / "metadata.pth")
    (directory / name).write_text("\n".join(f"{module}: {level}" for module, level in choice.items()))


def modules(model, *names):
    return [f"model.layers.{index}.{name}" for index in range(len(model.model.layers)) for name in names]
