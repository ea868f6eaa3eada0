"""What the published runs gave their rules, by model: numbers that are a rule's, not a network's.

References:
    Apolinario, Roy, Roy, https://arxiv.org/abs/2405.15868, section 4, and the code of its runs.
"""

import itertools

_HIDDEN = {"small_conv": (512, 256, 512, 512), "small_conv_l": (1536, 768, 2048, 2048)}
_WIDEST = 2048
_MANY_CLASSES = 200


def hidden_dim(model: str, groups: tuple[int, ...] | None = None) -> int | tuple[int, ...]:
    """Columns of the feedback matrix of ``local_classifier`` and the ``random`` rules.

    Args:
        model: its name.
        groups: blocks a group, where consecutive blocks share a loss: that of the last counts.

    >>> hidden_dim("small_conv"), hidden_dim("vgg8"), hidden_dim("small_conv", (2, 2, 1))
    ((512, 256, 512, 512), 2048, (256, 512))
    >>> hidden_dim("small_conv", (2, 3))  # The classifier belongs to the last.
    (256, 512)
    """
    widths = _HIDDEN.get(model)
    if widths is None or groups is None:
        return widths or _WIDEST
    ends = dict.fromkeys(min(end, len(widths)) for end in itertools.accumulate(groups))
    return tuple(widths[end - 1] for end in ends)


def basis_rows(model: str, num_classes: int) -> int:
    """Rows of the basis of ``lls_mxm_reduced``.

    >>> basis_rows("small_conv", 10), basis_rows("vgg8", 10), basis_rows("mobilenet_v1", 1000)
    (20, 100, 100)
    """
    if model.startswith("vgg"):
        return 100
    return 100 if model.startswith("mobilenet") and num_classes > _MANY_CLASSES else 20
