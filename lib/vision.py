"""A user's reference pictures, given to a Qwen3-VL.

They are found in the task, read by the model folder's own image processor, put into the dialogue as
<|image_pad|> tokens and into the forward pass as features of the frozen vision tower, at the
model's own rotary positions. Trainer and sampler both call `model_inputs`. A text model's tasks
have no pictures here. A picture is a pair (model folder or hub name, path of the file).
"""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

# A picture is made smaller to that (ours), 1,024 tokens of Qwen3-VL: a photograph of 12 megapixels
# would take 11,700.
MOST_PIXELS = 2**20


# --------------------------------------------------------------------------------------------------
# Pictures in the dialogue
def show_pictures(
    tokenizer: "PreTrainedTokenizerBase", task: dict, messages: list[dict]
) -> list[dict]:
    """Messages in which the first user turn carries the task's pictures, as `pictures`.

    An input names its file as `media`, an absolute path. Without a file there it stands for a
    picture, which the request alone describes. For a text model nothing changes.
    """
    source = getattr(tokenizer, "vision", None)
    pictures = []
    for given in task.get("inputs") or []:
        file = Path(given.get("media") or "")
        if given["kind"] == "image" and source and file.is_absolute() and file.is_file():
            pictures.append((source, str(file)))
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
    shown = list(messages)
    if pictures and first is not None:
        shown[first] = {**messages[first], "pictures": pictures}
    return shown


def pictures_of(messages: list[dict]) -> list[tuple[str, str]]:
    """The pictures that messages carry, in order."""
    return [picture for message in messages for picture in message.get("pictures", ())]


def spell_pictures(messages: list[dict]) -> tuple[list[dict], int]:
    """Messages with their pictures as tokens, and how many control tokens these are.

    A picture is <|image_pad|> tokens between two others, at the start of the content.
    """
    spelt, control_tokens = [], 0
    for message in messages:
        sizes = [read_picture(*picture)[2] for picture in message.get("pictures", ())]
        pads = [f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in sizes]
        if pads:
            message = {**message, "content": "".join(pads) + message["content"]}
        spelt.append(message)
        control_tokens += sum(n + 2 for n in sizes)
    return spelt, control_tokens


# --------------------------------------------------------------------------------------------------
# Files
@lru_cache(maxsize=64)
def read_picture(source: str, path: str) -> tuple[Tensor, Tensor, int]:
    """One picture: its patches, grid and count of tokens.

    Patches (n, 3 x 2 x patch x patch); grid (1, 3) of frames, rows and columns. SystemExit if the
    file cannot be read.
    """
    from PIL import Image

    processor = image_processor(source)
    bounds = ("shortest_edge", "longest_edge")
    size = {edge: min(processor.size[edge], MOST_PIXELS) for edge in bounds}
    try:
        with Image.open(path) as image:
            made = processor(image.convert("RGB"), size=size, return_tensors="pt")
    except (OSError, ValueError) as e:
        raise SystemExit(
            f"error: the user's picture {path} cannot be read: {e}; give a PNG, JPEG or WebP file, "
            f"or take it out of the task"
        ) from e
    grid = made["image_grid_thw"]
    tokens = int(grid.prod()) // processor.merge_size**2
    return made["pixel_values"], grid, tokens


@lru_cache(maxsize=4)
def image_processor(source: str) -> "BaseImageProcessor":
    """The image processor of a model folder or hub name, with Pillow.

    torchvision's resizing differs. SystemExit if the model has none.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(source, backend="pil")
    except (OSError, ValueError, ImportError) as e:
        raise SystemExit(
            f"error: {source} is a vision-language model without an image processor "
            f"({' '.join(str(e).split())[:200]}); its folder needs preprocessor_config.json"
        ) from e


# --------------------------------------------------------------------------------------------------
# Pictures in the forward pass
def model_inputs(
    base: "PreTrainedModel",
    ids: Tensor,
    positions: Tensor,
    pictures: list[tuple] | tuple,
    shift: Tensor | int = 0,
) -> dict[str, Tensor | list[Tensor]]:
    """What the language model of a Qwen3-VL is called with to read tokens, some of them pictures.

    base: the model without adapter wrapper. ids, positions (B, T), positions restarting at 0 with
    each example. pictures: (row, first token of the example, its pictures), in that order. shift
    (B, 1): where later tokens of a row with pictures stand, since a picture takes up fewer rotary
    positions than tokens.
    """
    positions = positions.expand(ids.shape)
    rope = (positions + shift).repeat(3, 1, 1)  # (3, B, T): frame, row, column
    if not pictures:
        return {"input_ids": ids, "position_ids": torch.cat([positions[None], rope])}
    is_picture = torch.zeros_like(ids, dtype=torch.bool)
    every_patch, every_grid = [], []
    for row, start, some in pictures:
        patches, grids, sizes = zip(*(read_picture(*picture) for picture in some))
        grid = torch.cat(grids).to(ids.device)
        end = example_end(positions[row], start)
        # Only the first <|image_pad|> tokens of an example are its pictures: an agent may write
        # that token as it may any other.
        pads = (ids[row, start:end] == base.config.image_token_id).nonzero().flatten()
        is_picture[row, start + pads[: sum(sizes)]] = True
        rope[:, row, start:end] = base.model.get_rope_index(
            ids[row, None, start:end], is_picture[row, None, start:end].int(), grid
        )[0][:, 0]
        every_patch += patches
        every_grid.append(grid)
    with torch.no_grad():  # the tower is frozen
        features = base.model.get_image_features(
            torch.cat(every_patch).to(ids.device), torch.cat(every_grid), return_dict=True
        )
    embedded = base.model.get_input_embeddings()(ids)
    seen = torch.cat(features.pooler_output).to(embedded.dtype)
    return {
        "inputs_embeds": embedded.masked_scatter(is_picture[..., None], seen),
        "visual_pos_masks": is_picture,
        "deepstack_visual_embeds": [torch.cat(layer) for layer in features.deepstack_features],
        "position_ids": torch.cat([positions[None], rope]),
    }


def example_end(positions: Tensor, start: int) -> int:
    """The first token after the example that begins at `start` of a packed row.

    positions (T,) restart at 0 with each example.
    """
    again = (positions[start + 1 :] == 0).nonzero().flatten()
    return start + 1 + int(again[0]) if len(again) else len(positions)
