"""The examples with networks of their own do what they say, in short runs of their functions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples import online_regression, tensorised, video


def test_frames_read_in_two_parts_are_those_read_at_once():
    torch.manual_seed(0)
    model = video.VideoModel(channels=4).double()
    clips = video.make_clips(2, 9, torch.Generator().manual_seed(0)).double()
    at_once, end = model(clips)
    first, states = model(clips[:, :4])
    second, end_in_parts = model(clips[:, 4:], states)
    # In float64 both are exact to rounding; worst error 4e-16.
    torch.testing.assert_close(torch.cat([first, second], 1), at_once, rtol=0, atol=1e-13)
    torch.testing.assert_close(end_in_parts, end, rtol=0, atol=1e-13)
    assert (model(clips[:, 4:])[0] - second).abs().max() > 1e-3  # the states matter


def test_a_frame_is_predicted_from_the_frames_before_it_and_from_its_surroundings_in_space():
    torch.manual_seed(0)
    model = video.VideoModel(channels=4, layers=1)
    clips = video.make_clips(1, 8, torch.Generator().manual_seed(0))
    changed = clips.clone()
    changed[0, 5, 0, 2, 2] = 5.0
    difference = (model(changed)[0] - model(clips)[0]).abs()[0, :, 0]
    assert torch.equal(difference[:5], torch.zeros_like(difference[:5]))
    reached = difference[7] > 0  # through in_proj and out_proj, 3 x 3 pixels each; from frame 5, so through the state
    assert reached[:5, :5].any() and not reached[5:].any() and not reached[:, 5:].any()


def test_shapes_keep_their_pixels_and_move_by_one_within_the_picture():
    clips = video.make_clips(20, 40, torch.Generator().manual_seed(0), shapes=1)[:, :, 0]
    area = clips.sum((-1, -2))
    assert torch.equal(area, area[:, :1].expand_as(area)) and set(area[:, 0].tolist()) == {2.0, 3.0, 4.0}
    for axis in (-1, -2):
        first = clips.amax(axis).argmax(-1)  # where the shape begins along the other axis
        assert torch.equal(first.diff(dim=1).abs(), torch.ones_like(first[:, 1:]))
        assert first.min() == 0 and first.max() == video.SIZE - 2


def test_a_video_model_soon_knows_where_the_shapes_may_be_next():
    torch.manual_seed(0)
    model, generator = video.VideoModel(channels=16, layers=2), torch.Generator().manual_seed(0)
    video.train(model, 150, generator, frames=8)
    clips = video.make_clips(8, 36, generator)
    share = clips[:, 1:].mean()
    with torch.no_grad():
        loss = F.binary_cross_entropy_with_logits(model(clips[:, :-1])[0], clips[:, 1:])
    # of one who knows only how many pixels are set
    assert loss < 0.8 * F.binary_cross_entropy(share.expand(clips[:, 1:].shape), clips[:, 1:])


def test_a_frame_is_exact_when_every_pixel_is_right_and_the_first_do_not_count():
    clips = video.make_clips(1, 12, torch.Generator().manual_seed(0))
    predicted = clips[:, 1:].bool()
    predicted[:, : video.WARM_UP - 1] ^= True
    assert video.exact(predicted, clips) == 1
    predicted[0, 7, 0, 3, 3] ^= True
    assert video.exact(predicted, clips) == pytest.approx(7 / 8)


@pytest.mark.parametrize(
    "outputs, inputs, rank",
    [((8, 4, 4), (4, 4, 4), 4), ((2, 3), (5, 7), 3), ((6,), (5,), 4), ((2, 3, 1), (1, 2, 3), 5)],
)
def test_the_output_of_a_tensor_train_and_its_gradients_are_those_of_its_dense_product(outputs, inputs, rank):
    torch.manual_seed(0)
    layer = tensorised.TensorTrainLinear(outputs, inputs, rank).double()
    x = torch.randn(2, 3, layer.dense().shape[1], dtype=torch.float64, requires_grad=True)
    y = layer(x)
    # An entry from the definition: a product of the matrices that the digits of its row and its column choose.
    row, column = torch.arange(y.shape[-1]), torch.arange(x.shape[-1])
    rows, columns = torch.unravel_index(row, outputs), torch.unravel_index(column, inputs)
    entry = torch.eye(1, dtype=torch.float64)
    for core, o, i in zip(layer.cores, rows, columns):
        entry = entry @ core[:, o[-1], i[-1]]
    torch.testing.assert_close(layer.dense()[-1, -1], entry[0, 0])
    weight = torch.randn_like(y)
    leaves = [x, *layer.cores]
    gradients = torch.autograd.grad((y * weight).sum(), leaves)
    expected = F.linear(x, layer.dense())
    # float64; worst errors 2e-15 and 2e-14
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for a, b in zip(gradients, torch.autograd.grad((expected * weight).sum(), leaves)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_model_with_tensor_trains_is_the_model_with_their_dense_products():
    torch.manual_seed(0)
    model = tensorised.tensor_train_model(rank=3)
    twin = copy.deepcopy(model)
    for layer in twin.model.layers:
        matrix = layer.rnn.in_proj.dense().detach()
        layer.rnn.in_proj = nn.Linear(*matrix.T.shape, bias=False)
        layer.rnn.in_proj.weight.data = matrix
    texts, _ = tensorised.make_batch(4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(texts).logits, twin(texts).logits, rtol=0, atol=1e-5)  # float32; worst 7e-7
    assert model.num_parameters() < twin.num_parameters() - 10_000


def test_the_symbols_to_repeat_stand_in_the_text_in_their_order():
    texts, symbols = tensorised.make_batch(50, torch.Generator().manual_seed(0))
    assert torch.equal(texts[texts > 1].view_as(symbols), symbols)
    assert (texts[:, -tensorised.COPIED :] == 1).all() and (texts == 1).sum() == symbols.numel()


def test_a_model_with_tensor_trains_learns_to_repeat_symbols():
    torch.manual_seed(0)
    model = tensorised.tensor_train_model(rank=4)
    assert tensorised.train(model, 150, torch.Generator().manual_seed(0)) > 2 / tensorised.SYMBOLS  # twice chance


REGRESSORS = [online_regression.MinGRURegressor, online_regression.LSTMRegressor]


@pytest.mark.parametrize("regressor", REGRESSORS)
def test_each_prediction_is_made_before_its_sample_is_seen(regressor):
    series = online_regression.make_series(60, seed=0)
    changed = series.clone()
    changed[40:] += 1.0
    predictions = []
    for samples in (series, changed):
        torch.manual_seed(0)
        predictions.append(online_regression.learn_online(regressor(), samples, 1e-2))
    # predictions[k] is of sample k + 1: that of sample 40 is the last that cannot know.
    assert torch.equal(predictions[0][:40], predictions[1][:40])
    assert not torch.equal(predictions[0][40:], predictions[1][40:])


@pytest.mark.parametrize("regressor", REGRESSORS)
def test_without_learning_a_prediction_made_from_the_carried_state_is_that_of_the_whole_series(regressor):
    torch.manual_seed(0)
    model, series = regressor(), online_regression.make_series(50, seed=0)
    with torch.no_grad():
        at_once, _ = model(series[:-1].reshape(1, -1, 1), None)
    predictions = online_regression.learn_online(model, series, learning_rate=0.0)
    torch.testing.assert_close(predictions, at_once.flatten(), rtol=0, atol=1e-6)  # float32; worst 6e-8


def test_learning_online_beats_the_last_value_and_predicting_without_learning():
    series = online_regression.make_series(800, seed=0)
    errors = []
    for rate in (1e-2, 0.0):
        torch.manual_seed(0)
        predictions = online_regression.learn_online(online_regression.MinGRURegressor(), series, rate)
        errors.append(online_regression.mean_squared_error(predictions, series))
    last_value = online_regression.mean_squared_error(series[:-1], series)
    assert errors[0] < 0.7 * min(errors[1], last_value)


def test_both_regressors_have_nearly_as_many_parameters():
    sizes = [sum(p.numel() for p in regressor().parameters()) for regressor in REGRESSORS]
    assert abs(sizes[0] - sizes[1]) < 0.03 * sizes[1]
