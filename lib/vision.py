"""A user's reference pictures, given to a Qwen3-VL: found in the task, read by the model folder's own image processor, put into the dialogue as
<|image_pad|> tokens and into the forward pass as features of the frozen vision tower, at the model's own rotary positions.

Trainer and sampler both call `place`. Text models never come here. A picture is a pair (model folder or hub name, path of the file).
"""

from functools import lru_cache
from pathlib import Path

import torch

MOST_PIXELS = (
    2**20
)  # a picture is made smaller to that, 1,024 tokens of Qwen3-VL: a photograph of 12 megapixels would take 11,700


@lru_cache(maxsize=4)
def image_processor(source):
    """The image processor of a model folder or hub name, with Pillow (torchvision's resizing differs); SystemExit if it has none."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(source, backend="pil")
    except (OSError, ValueError, ImportError) as e:
        raise SystemExit(
            f"error: {source} is a vision-language model without an image processor ({' '.join(str(e).split())[:200]}); "
            f"its folder needs preprocessor_config.json"
        ) from e


@lru_cache(maxsize=64)
def read_picture(source, path):
    """One picture: patches (n, 3 x 2 x patch x patch), grid (1, 3) of frames, rows and columns, count of tokens. SystemExit if it cannot be read."""
    from PIL import Image

    processor = image_processor(source)
    size = {
        "shortest_edge": min(processor.size["shortest_edge"], MOST_PIXELS),
        "longest_edge": min(processor.size["longest_edge"], MOST_PIXELS),
    }
    try:
        with Image.open(path) as image:
            made = processor(image.convert("RGB"), size=size, return_tensors="pt")
    except (OSError, ValueError) as e:
        raise SystemExit(
            f"error: the user's picture {path} cannot be read: {e}; give a PNG, JPEG or WebP file, or take it out of the task"
        ) from e
    return (
        made["pixel_values"],
        made["image_grid_thw"],
        int(made["image_grid_thw"].prod()) // processor.merge_size**2,
    )


def show_pictures(tokenizer, task, messages):
    """Messages in which the first user turn carries, as `pictures`, the task's pictures whose file is there; unchanged for a text model.

    An input names its file as `media`, an absolute path. Without one it stands for a picture, which the request alone describes.
    """
    source = getattr(tokenizer, "vision", None)
    files = [
        Path(given.get("media") or "")
        for given in task.get("inputs") or []
        if given["kind"] == "image"
    ]
    found = [(source, str(f)) for f in files if source and f.is_absolute() and f.is_file()]
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
    return [{**m, "pictures": found} if found and i == first else m for i, m in enumerate(messages)]


def pictures_of(messages):
    """The pictures that messages carry, in order."""
    return [picture for m in messages for picture in m.get("pictures", ())]


def spell_pictures(messages):
    """Messages with their pictures as <|image_pad|> tokens at the start of the content, and how many control tokens these are."""
    sizes = [[read_picture(*p)[2] for p in m.get("pictures", ())] for m in messages]
    spelt = [
        "".join(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in some)
        for some in sizes
    ]
    return [{**m, "content": s + m["content"]} if s else m for m, s in zip(messages, spelt)], sum(
        n + 2 for some in sizes for n in some
    )


def model_inputs(base, ids, positions, pictures, shift=0):
    """What the language model of a Qwen3-VL (`base`, without adapter wrapper) is called with to read tokens of which some are pictures.

    ids, positions (B, T), positions restarting at 0 with each example; pictures: (row, first token of the example, its pictures), in that order;
    shift (B, 1): where later tokens of a row with pictures stand, since a picture takes up fewer rotary positions than tokens.
    Only the first <|image_pad|> tokens of an example are its pictures: an agent may write that token as it may any other.
    """
    positions = positions.expand(ids.shape)
    rope = (positions + shift).repeat(3, 1, 1)  # frame, row, column
    if not pictures:
        return {"input_ids": ids, "position_ids": torch.cat([positions[None], rope])}
    model, seen, pixels, grids = base.model, torch.zeros_like(ids, dtype=torch.bool), [], []
    for row, start, some in pictures:
        patches, grid, sizes = zip(*(read_picture(*p) for p in some))
        again = (positions[row, start + 1 :] == 0).nonzero().flatten()
        end = start + 1 + int(again[0]) if len(again) else ids.shape[1]
        seen[
            row,
            start
            + (ids[row, start:end] == base.config.image_token_id).nonzero().flatten()[: sum(sizes)],
        ] = True
        grids.append(torch.cat(grid).to(ids.device))
        pixels += patches
        rope[:, row, start:end] = model.get_rope_index(
            ids[row, None, start:end], seen[row, None, start:end].int(), grids[-1]
        )[0][:, 0]
    with torch.no_grad():  # the tower is frozen
        features = model.get_image_features(
            torch.cat(pixels).to(ids.device), torch.cat(grids), return_dict=True
        )
    embedded = model.get_input_embeddings()(ids)
    return {
        "inputs_embeds": embedded.masked_scatter(
            seen[..., None], torch.cat(features.pooler_output).to(embedded.dtype)
        ),
        "visual_pos_masks": seen,
        "deepstack_visual_embeds": [torch.cat(f) for f in features.deepstack_features],
        "position_ids": torch.cat([positions[None], rope]),
    }
