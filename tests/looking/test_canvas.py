"""Where squares are on a canvas."""

import numpy as np

from stf_jax.looking.canvas import make_canvas


def test_tiles_are_beside_the_thumbnail():
    canvas = make_canvas((1, 2), (2, 1))
    assert canvas.grid == (2, 5)
    assert canvas.places.tolist() == [[0, 1], [3, 4], [8, 9]]
    pixels = np.arange(3 * 3 * 7, dtype=np.uint8).reshape(3, 3, 7, 1).repeat(3, -1)  # patches of 3×3, one column more
    gray = np.full((3, 3), 128)
    expected = np.block(
        [
            [pixels[0, :, :6, 0], gray, pixels[1, :, :6, 0]],
            [gray, gray, gray, pixels[2, :, :6, 0]],
        ]
    )
    np.testing.assert_array_equal(canvas.draw(pixels, 3)[..., 0], expected)


def test_values_go_to_the_patches_of_their_square():
    canvas = make_canvas((1, 2), (1, 1))
    values = np.array([[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]])
    assert canvas.spread(values, np.array([1, 2, 0])).tolist() == [[[0, 0, 0, 1, 2]], [[0] * 5], [[5, 6, 0, 0, 0]]]
    assert make_canvas((2, 2), None).spread(np.eye(4), np.zeros(4, int)).tolist() == np.eye(4).tolist()
