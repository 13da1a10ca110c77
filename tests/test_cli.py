"""The command line, as a user meets it: in processes of its own."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_cupy
import numpy as np
import pytest
from test_datasets import idx, write_idx_directory

import backprop_gpu as bp
from backprop_gpu import backend, cli, report
from backprop_gpu.optimizers import OPTIMIZERS

COMMAND = [sys.executable, "-m", "backprop_gpu"]


def run(*args, code=0, cwd=None, env=None, command=COMMAND):
    done = subprocess.run(
        [*command, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def last_json(done):
    return json.loads(done.stdout.splitlines()[-1], parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))


def refused(*args, code, cause, **kwargs):
    """One line of cause, one of cure, nothing on stdout."""
    done = run(*args, code=code, **kwargs)
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("backprop-gpu: error: ")
    assert lines[1].startswith("backprop-gpu: try: ")
    assert cause in lines[0]
    assert done.stdout == ""


@pytest.fixture
def folder(tmp_path):
    """A small set of IDX files: 2 x 2 images of three classes."""
    (tmp_path / "data").mkdir()
    return write_idx_directory(tmp_path / "data")


def test_train_evaluate_predict_on_mnist(tmp_path):
    model = tmp_path / "model.safetensors"
    done = run("train", "--layers", "784-32-10", "--epochs", 1, "--save", model, "--json")
    result = last_json(done)
    assert result["backend"] == "numpy"
    assert result["layers"] == [784, 32, 10]
    assert result["parameters"] == 784 * 32 + 32 + 320 + 10
    assert (result["epochs"], result["steps"], result["seed"]) == (1, 469, 0)
    assert result["precision"] == "float32"
    assert result["test_accuracy"] > 0.9
    assert result["samples_per_second"] == pytest.approx(60_000 / result["train_seconds"])
    assert set(result) >= {"device", "train_cost", "test_cost"}
    assert "Traceback" not in done.stderr

    evaluated = last_json(run("evaluate", model, "--data", "mnist", "--json"))
    assert evaluated == {
        "test_cost": result["test_cost"],
        "test_accuracy": result["test_accuracy"],
        "samples": 10_000,
    }
    images = bp.datasets.MNIST / "t10k-images-idx3-ubyte.gz"
    predicted = last_json(run("predict", model, images, "--proba", "--json"))
    labels = bp.datasets.load("mnist")[1].labels
    assert np.mean(np.array(predicted["predictions"]) == labels) == pytest.approx(result["test_accuracy"])
    np.testing.assert_allclose(np.sum(predicted["probabilities"], axis=1), 1, rtol=1e-5)

    lines = run("predict", model, images).stdout.splitlines()
    assert [int(line) for line in lines] == predicted["predictions"]


def test_the_same_seed_gives_the_same_file(tmp_path, folder):
    contents = []
    for name in ("a", "b"):
        run("train", "--data", folder, "--epochs", 3, "--seed", 7, "--batch-size", 4, "--save", tmp_path / name)
        contents.append(without_the_clock(tmp_path / name))
    assert contents[0] == contents[1]


def test_a_run_is_taken_up_again(tmp_path, folder):
    """Cut by its own number of epochs; then over; then with other settings; the JSON is that of the whole run."""
    args = ["train", "--data", folder, "--schedule", "constant", "--batch-size", 4, "--resume", "--json"]
    whole = last_json(run(*args, "--epochs", 4, "--save", tmp_path / "whole"))
    assert "resumed" not in whole
    run(*args, "--epochs", 2, "--save", tmp_path / "m", "--checkpoint-every", "1 step")
    told = run(*args, "--epochs", 4, "--save", tmp_path / "m")
    assert told.stderr == f"the run in {tmp_path / 'm'} went on after step 4\nsaved to {tmp_path / 'm'}\n"
    assert without_the_clock(tmp_path / "m") == without_the_clock(tmp_path / "whole")
    again = run(*args, "--epochs", 4, "--save", tmp_path / "m")
    assert again.stderr == f"the run in {tmp_path / 'm'} is over since step 8\n"
    clock = ("train_seconds", "samples_per_second")
    for done, resumed in ((told, 4), (again, 8)):
        assert {k: v for k, v in last_json(done).items() if k not in clock} == {
            **{k: v for k, v in whole.items() if k not in clock}, "resumed": resumed,
        }  # fmt: skip
    more = [*args[:-2], "--epochs", 4, "--save", tmp_path / "m", "--resume"]
    refused(*more, "--lr", 0.5, code=2, cause="lr of optimizer is 0.5, not 0.002 as in the run that")
    refused(*more, "--layers", "4,7,3", code=2, cause="layers is [4, 7, 3], not [4, 512, 3]")
    refused(*more, "--batch-size", 3, code=2, cause="batch_size is 3, not 4")
    refused(*more, "--epochs", 3, code=2, cause="epochs is 3, not 4")


def test_taking_layers_over_once_more_is_refused_where_they_are_others(tmp_path, folder):
    args = ["train", "--data", folder, "--layers", "4,5,3", "--epochs", 1]
    for seed in (1, 2):
        run(*args, "--seed", seed, "--save", tmp_path / f"first{seed}")
    kept = [*args, "--save", tmp_path / "m", "--resume", "--pretrained"]
    run(*kept, tmp_path / "first1")
    run(*kept, tmp_path / "first1")
    refused(*kept, tmp_path / "first2", code=2, cause="the run began with other parameters")
    refused(*args, "--save", tmp_path / "m", "--resume", code=2, cause="the run began with other parameters")


def test_a_run_that_retreats(folder):
    args = ["train", "--data", folder, "--output", "identity", "--optimizer", "sgd", "--lr", 1e12, "--epochs", 2]
    done = run(*args, "--layers", "4,3", "--batch-size", 1, "--retreats", 99, "--json")
    assert last_json(done)["retreats"]
    assert "warning: training diverged in epoch 1" in done.stderr


def test_doctor_explains_a_file(tmp_path, folder):
    run("train", "--data", folder, "--layers", "4,5,3", "--epochs", 2, "--save", tmp_path / "m", "--validation", 0.3)
    found = last_json(run("doctor", tmp_path / "m", "--json"))
    assert (found["sound"], found["layers"], found["parameters"], found["format_version"]) == (True, [4, 5, 3], 43, "3")
    assert (found["run"]["step"], found["run"]["stopped"]) == (2, "epochs")
    assert found["run"]["settings"]["optimizer"]["name"] == "Adam"
    text = run("doctor", tmp_path / "m").stdout
    assert "2 of 2 epochs, 2 of 2 steps: over, by its epochs" in text
    bp.save(bp.load(tmp_path / "m", "numpy"), tmp_path / "alone")
    assert "none: a network alone" in run("doctor", tmp_path / "alone").stdout
    content = bytearray((tmp_path / "m").read_bytes())
    content[-9] ^= 1
    (tmp_path / "m").write_bytes(content)
    refused("doctor", tmp_path / "m", code=1, cause="is damaged")


def without_the_clock(path):
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    del header["__metadata__"]["clock"], header["__metadata__"]["sha256_of_metadata"]
    return header, content[end:]


@pytest.mark.parametrize("layers", ["4,8,3", "4-8-3", "4/8/3", " 4, 8, 3 "])
def test_layers_are_written_in_any_of_three_ways(folder, layers):
    assert last_json(run("train", "--data", folder, "--layers", layers, "--epochs", 1, "--json"))["layers"] == [4, 8, 3]


def test_every_setting_reaches_the_network(tmp_path, folder):
    model = tmp_path / "m"
    args = "--activation gelu --output sigmoid --cost squared_error --init lecun_uniform --no-bias --optimizer nesterov"
    more = "--lr 0.01 --schedule constant --epochs 2 --batch-size 2 --seed 5 --precision float64 --backend numpy"
    result = last_json(run("train", "--data", folder, *args.split(), *more.split(), "--save", model, "--json"))
    assert (result["steps"], result["precision"], result["seed"]) == (6, "float64", 5)
    net = bp.load(model, "numpy")
    wanted = bp.Network([4, 512, 3], "gelu", "sigmoid", "lecun_uniform", False, "float64", 5, "numpy")
    train, _ = bp.datasets.load(folder)
    history = bp.train(
        wanted,
        *train,
        cost="squared_error",
        optimizer=bp.SGD(0.01, momentum=0.9, nesterov=True),
        epochs=2,
        batch_size=2,
        seed=5,
    )
    np.testing.assert_array_equal(net.theta, wanted.theta)
    assert result["train_cost"] == history.train_cost[-1]


def test_every_further_setting_reaches_training(tmp_path, folder):
    args = "--layers 4,6,5,3 --activation relu,tanh --init he,glorot,lecun --dropout 0.2,0.1 --cost huber:delta=0.5"
    more = "--reduction sum --optimizer sgd:momentum=0.5,weight_decay=0.01 --lr 0.05 --schedule step:every=2,factor=0.5"
    rest = "--warmup 3 --epochs 5 --batch-size 2 --batches chunks --class-weight 1,2,3 --l1 0.01 --l2 0.02 --frozen 1"
    last = (
        "--clip-norm 1 --clip-value 0.3 --gradient-norms --seed 4 --precision float64 --backend numpy --validation 0.4"
    )
    flags = f"{args} {more} {rest} {last} --patience 4 --gradient-tolerance 1e-9 --parameter-tolerance 1e-9".split()
    result = last_json(run("train", "--data", folder, *flags, "--time-limit", 100, "--save", tmp_path / "m", "--json"))
    net = bp.Network(
        [4, 6, 5, 3],
        ["relu", "tanh"],
        init=["he", "glorot", "lecun"],
        precision="float64",
        seed=4,
        backend="numpy",
        dropout=[0.2, 0.1],
    )
    history = bp.train(
        net,
        *bp.datasets.load(folder)[0],
        cost="huber:delta=0.5",
        optimizer=bp.SGD(0.05, momentum=0.5, weight_decay=0.01),
        schedule=bp.schedules.Warmup(3, bp.schedules.Step(2, 0.5)),
        epochs=5,
        batch_size=2,
        validation=0.4,
        seed=4,
        reduction="sum",
        class_weight=[1, 2, 3],
        l1=0.01,
        l2=0.02,
        clip_norm=1,
        clip_value=0.3,
        batches="chunks",
        frozen=1,
        patience=4,
        gradient_norms=True,
    )
    back = bp.load(tmp_path / "m", "numpy")
    np.testing.assert_array_equal(back.theta, net.theta)
    assert back.dropout == [0.2, 0.1]
    assert back.cost == "huber:delta=0.5"
    for key in ("validation_cost", "validation_accuracy", "best_epoch", "gradient_norms", "stopped"):
        assert result[key] == getattr(history, key)
    assert result["train_cost"] == history.train_cost[-1]


def test_what_ended_the_run_is_told(folder):
    flags = "--epochs 3000 --lr 0.1 --optimizer sgd --schedule constant --batch-size full --layers 4,3".split()
    done = run("train", "--data", folder, *flags, "--gradient-tolerance", 0.1, "--gradient-norms")
    assert "stopped by the norm of the gradient" in done.stdout
    assert "epoch 1: ||dC/dW|| by layer " in done.stdout
    assert last_json(run("train", "--data", folder, *flags, "--time-limit", 1e-6, "--json"))["stopped"] == "time"


def test_label_smoothing_reaches_training(folder):
    costs = [
        last_json(run("train", "--data", folder, "--epochs", 1, "--label-smoothing", e, "--json"))["train_cost"]
        for e in (0, 0.5)
    ]
    assert costs[0] != costs[1]


def test_layers_are_carried_over_and_frozen(tmp_path, folder):
    """An autoencoder's first layer in a classifier: source 5, "The preprocessing could be done by a previous model"."""
    train, _ = bp.datasets.load(folder)
    auto = bp.Network([4, 5, 4], "tanh", "sigmoid", seed=3, backend="numpy")
    bp.train(auto, train.images, train.images / 255, epochs=2)
    bp.save(auto, tmp_path / "auto")
    args = "--layers 4,5,3 --activation tanh --epochs 2 --frozen 1 --backend numpy".split()
    run("train", "--data", folder, *args, "--pretrained", tmp_path / "auto", "--save", tmp_path / "m")
    net = bp.load(tmp_path / "m", "numpy")
    np.testing.assert_array_equal(net.W[1], auto.W[1])
    np.testing.assert_array_equal(net.b[1], auto.b[1])
    more = ("--pretrained", tmp_path / "auto", "--carry-over", 2)
    refused(
        "train", "--data", folder, *args, *more, code=2, cause="layer 2 is 3 x 5 softmax here and 4 x 5 sigmoid there"
    )


def test_gradcheck():
    done = run("gradcheck", "--layers", "4,5,3", "--activation", "gelu", "--l2", 0.1, "--dropout", 0.4)
    assert done.stdout.splitlines()[-1].startswith("passed: largest error")
    found = last_json(run("gradcheck", "--data", "mnist", "--samples", 3, "--precision", "float32", "--json"))
    assert found["passed"] is True
    assert found["layers"] == [784, 16, 10]
    assert [t["name"] for t in found["tensors"]] == ["W[1]", "b[1]", "W[2]", "b[2]"]
    assert all(t["own"] < 1e-4 for t in found["tensors"])
    lost = run("gradcheck", "--eps", 1e-15, "--json", code=1)  # every difference drowns in rounding: nothing is shown
    assert last_json(lost)["passed"] is False
    refused("gradcheck", "--eps", 0, code=2, cause="eps is 0.0")
    refused("gradcheck", "--activation", "rellu", code=2, cause="unknown activation 'rellu'")


def test_example(tmp_path):
    listed = run("example").stdout
    assert "zero-init" in listed
    found = last_json(run("example", "counting", "--json"))
    assert found
    assert "79,510" in run("example", "counting").stdout
    refused("example", "zero-inti", code=2, cause="unknown example 'zero-inti'")
    refused("example", "counting", "--plot", tmp_path / "x.png", code=2, cause="has nothing to draw")
    refused("example", "chain", "--seed", -1, code=2, cause="seed is -1")


def test_npz_regression(tmp_path):
    x = np.linspace(-1, 1, 50)[:, None]
    np.savez(tmp_path / "d.npz", x_train=x, y_train=x[:, 0] ** 2)
    result = last_json(run("train", "--data", tmp_path / "d.npz", "--epochs", 2, "--save", tmp_path / "m", "--json"))
    assert result["layers"] == [1, 512, 1]
    assert result["train_accuracy"] is result["test_cost"] is result["test_accuracy"] is None
    np.save(tmp_path / "x.npy", x[:3])
    predicted = last_json(run("predict", tmp_path / "m", tmp_path / "x.npy", "--json"))["predictions"]
    np.testing.assert_allclose(predicted, bp.load(tmp_path / "m", "numpy").predict(x[:3]))
    refused("predict", tmp_path / "m", tmp_path / "x.npy", "--proba", code=2, cause="are not probabilities")
    refused("evaluate", tmp_path / "m", "--data", tmp_path / "d.npz", code=1, cause="has no test data")


def test_doctor():
    found = last_json(run("doctor", "--json"))
    assert found["backend"] == "numpy"
    assert found["reason"]
    assert found["versions"]["numpy"] == np.__version__
    assert found["blas"]["name"]
    assert re.search(r"^backend +numpy: ", run("doctor").stdout)
    told = last_json(run("doctor", "--json", env={"BACKPROP_GPU_BACKEND": "numpy"}))
    assert told["reason"] == "NumPy was asked for"
    assert told["environment"]["BACKPROP_GPU_BACKEND"] == "numpy"


def test_doctor_with_a_gpu():
    """On the stand-in for CuPy: what a machine with a GPU is told."""
    with fake_cupy.installed():
        found = report.doctor(backend.choose("cupy"))
    assert (found["backend"], found["device"], found["cure"]) == ("cupy", "Fake GPU", None)
    assert found["versions"]["cuda_runtime"] == "13.0"
    assert "driver" in report.doctor_text(found)


def test_doctor_knows_openblas():
    b = report.blas()
    if "openblas" not in b["name"]:
        pytest.skip(f"NumPy's BLAS is {b['name']}")
    assert b["core"]
    assert b["threads"] >= 1


def test_defaults_are_the_recipe_of_the_readme():
    defaults = {p.name: p.default for p in cli.train.params}
    assert defaults["data"] == "mnist"
    assert (defaults["optimizer"], OPTIMIZERS["adam"][0], defaults["schedule"]) == ("adam", 2e-3, "cosine")
    assert (defaults["epochs"], defaults["batch_size"], defaults["seed"]) == (10, 128, 0)
    assert (defaults["activation"], defaults["init"], defaults["precision"]) == ("relu", "he", "float32")


@pytest.mark.slow
def test_the_default_run_reaches_98_percent():
    result = last_json(run("train", "--json"))
    assert result["layers"] == [784, 512, 10]
    assert result["parameters"] == 407_050
    assert result["test_accuracy"] >= 0.98
    assert result["samples_per_second"] == pytest.approx(600_000 / result["train_seconds"])


def test_help_and_version():
    help_text = run("--help").stdout
    for command in ("train", "evaluate", "predict", "doctor"):
        assert command in help_text
    assert "leaky_relu" in run("train", "--help").stdout
    assert run("--version").stdout.split() == ["backprop-gpu,", "version", bp.__version__]


@pytest.mark.parametrize(
    ("args", "cause"),
    [
        (["trian"], "No such command"),
        (["train", "--lerning-rate", "1"], "No such option"),
        (["train", "--activation", "rleu"], "unknown activation 'rleu'"),
        (["train", "--activation", "relu,rleu"], "unknown activation 'rleu'"),
        (["train", "--layers", "4,5,3", "--activation", "relu,tanh"], "hidden has 2 entries for 1 layers"),
        (["train", "--optimizer", "adma"], "unknown optimizer 'adma'"),
        (["train", "--optimizer", "sgd:momentun=0.9"], "'momentun'"),
        (["train", "--optimizer", "sgd:momentum"], "is not key=value"),
        (["train", "--cost", "hubr"], "unknown cost 'hubr'"),
        (["train", "--cost", "huber:delta=0"], "delta is 0.0"),
        (["train", "--schedule", "cosin"], "unknown schedule 'cosin'"),
        (["train", "--schedule", "step:every=0"], "every is 0"),
        (["train", "--batches", "chunk"], "unknown kind of batches 'chunk'"),
        (["train", "--reduction", "summ"], "unknown reduction 'summ'"),
        (["train", "--dropout", "1"], "dropout is 1.0"),
        (["train", "--patience", "2"], "patience without validation data"),
        (["train", "--frozen", "2"], "frozen is 2"),
        (["train", "--warmup", "-1"], "is -1"),
        (["train", "--batch-size", "half"], "'half' is not a valid integer"),
        (["train", "--class-weight", "1,x"], "'x' is not a valid float"),
        (["train", "--class-weight", "1,2"], "class_weight is [1.0, 2.0]"),
        (["train", "--carry-over", "2"], "--carry-over without --pretrained"),
        (["gradcheck", "--all", "--activation", "relu"], "--activation beside --all"),
        (["train", "--layers", "784,x,10"], "'784,x,10' is not a list of widths"),
        (["train", "--layers", "784,,10"], "is not a list of widths"),
        (["train", "--layers", "784"], "layers is [784]"),
        (["train", "--layers", "784,0,10"], "layers is [784, 0, 10]"),
        (["train", "--layers", "784,99999999999999,10"], "more than"),
        (["train", "--lr", "fast"], "'fast' is not a valid float"),
        (["train", "--lr", "nan"], "lr is nan"),
        (["train", "--lr", "0"], "lr is 0.0"),
        (["train", "--epochs", "0"], "epochs is 0"),
        (["train", "--epochs", "1.5"], "'1.5' is not a valid integer"),
        (["train", "--batch-size", "-1"], "batch_size is -1"),
        (["train", "--seed", "-1"], "seed is -1"),
        (
            ["train", "--output", "tanh", "--cost", "cross_entropy"],
            "cost 'cross_entropy' does not go with output 'tanh'",
        ),
        (["train", "--precision", "float16"], "unknown precision 'float16'"),
        (["train", "--resume"], "resume without save"),
        (["train", "--checkpoint-every", "2 epochs"], "checkpoint_every without save"),
        (["train", "--checkpoint-every", "often", "--save", "m"], "checkpoint_every is 'often'"),
        (["train", "--on-checkpoint-error", "ignore"], "unknown choice 'ignore'"),
        (["train", "--retreats", "-1"], "retreats is -1"),
        (["evaluate"], "Missing argument 'MODEL'"),
        (["predict", "model"], "Missing argument 'FILE'"),
    ],
)
def test_bad_flags_exit_2(folder, args, cause):
    data = ["--data", folder] if args[0] == "train" else []
    refused(*args, *data, code=2, cause=cause)


@pytest.mark.parametrize(
    ("args", "cause"),
    [
        (["train", "--data", "nowhere"], "there is no dataset 'nowhere'"),
        (["train", "--layers", "5,3"], "X has 4 features, the network takes 5"),
        (["train", "--layers", "4,2"], "labels must be in 0..1, found 2 at row 2"),
        (["train", "--lr", "1e30", "--optimizer", "sgd", "--output", "identity"], "training diverged in epoch"),
        (["train", "--save", "no/such/place"], "there is no directory"),
        (["train", "--backend", "cupy"], "CuPy is not installed"),
        (["evaluate", "nothing"], "nothing cannot be read"),
        (["doctor", "nothing"], "nothing cannot be read"),
        (["predict", "nothing", "x.npy"], "nothing cannot be read"),
    ],
)
def test_bad_data_files_and_runs_exit_1(folder, tmp_path, args, cause):
    data = ["--data", folder] if args[0] == "train" and "--data" not in args else []
    if "cupy" in args:
        try:
            bp.Network([1, 1], backend="cupy")
            pytest.skip("this machine has a GPU")
        except bp.BackendError as e:
            cause = e.cause
    refused(*args, *data, code=1, cause=cause, cwd=tmp_path)


@pytest.mark.parametrize(
    ("arrays", "cause"),
    [
        ({"x_train": np.full((4, 2), np.nan), "y_train": np.zeros(4, int)}, "X holds nan at row 0, column 0"),
        ({"x_train": np.ones((4, 2)), "y_train": np.zeros(3, int)}, "x_train has shape (4, 2), y_train (3,)"),
        ({"x_train": np.ones((0, 2)), "y_train": np.zeros(0, int)}, "x_train is empty, shape (0, 2)"),
        ({"x_train": np.ones((4, 2), object), "y_train": np.zeros(4, int)}, "pickled objects are never read"),
        ({"x_train": np.ones((4, 2)), "y_train": np.array([0, 1, -1, 0])}, "labels must be in 0..1, found -1 at row 2"),
    ],
)
def test_bad_arrays_exit_1_and_save_nothing(tmp_path, arrays, cause):
    np.savez(tmp_path / "d.npz", **arrays)
    refused("train", "--data", "d.npz", "--save", "m", code=1, cause=cause, cwd=tmp_path)
    assert not (tmp_path / "m").exists()


def test_predict_refuses_what_does_not_fit(tmp_path, folder):
    run("train", "--data", folder, "--epochs", 1, "--save", tmp_path / "m")
    np.save(tmp_path / "x.npy", np.ones((3, 5)))
    refused("predict", tmp_path / "m", tmp_path / "x.npy", code=1, cause="X has 5 features, the network takes 4")
    (tmp_path / "l").write_bytes(idx(np.zeros(4, np.uint8)))
    refused("predict", tmp_path / "m", tmp_path / "l", code=1, cause="has 1 dimensions (labels), not 3 (images)")
    refused("evaluate", tmp_path / "m", code=1, cause="X has 784 features, the network takes 4")


def start(*args, **kwargs):
    return subprocess.Popen(
        [*COMMAND, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


SIGNALS = pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "hung up")],
)


@SIGNALS
def test_signals_save_the_last_whole_step(tmp_path, number, code, word):
    # Wide enough that it would take minutes; the signal comes once training is well under way.
    kept = "--save", tmp_path / "m", "--checkpoint-every", "100 steps"
    with start("train", "--layers", "784,64,10", "--epochs", 1000, *kept) as process:
        while not (tmp_path / "m").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert out == ""
    found = re.fullmatch(rf"backprop-gpu: {word} after step (\d+); the network of that step is saved to .*\n", err)
    assert found, err
    assert int(found[1]) > 0
    assert bp.evaluate(bp.load(tmp_path / "m", "numpy"), *bp.datasets.load("mnist")[1]).accuracy > 0.5


@SIGNALS
def test_signals_outside_training(number, code, word):
    script = f"""
import os, signal, sys
from backprop_gpu import cli, datasets
datasets.load = lambda data: os.kill(os.getpid(), {int(number)})
cli.main(["train"])
"""
    assert run(code=code, command=[sys.executable, "-c", script]).stderr == f"backprop-gpu: {word}\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_while_the_program_starts(number, code):
    """While what it is made of is imported, which takes a good part of a second."""
    script = f"""
import os, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "numpy":
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Finder)
from backprop_gpu.__main__ import main
main()
"""
    done = run("train", code=code, command=[sys.executable, "-c", script])
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("where", ["_fail", "report.tell"])
def test_a_signal_while_the_end_is_told(where):
    script = f"""
import os, signal, sys
from backprop_gpu import cli, report
plain = cli.{where}
def told(*args):
    os.kill(os.getpid(), signal.SIGINT)
    return plain(*args)
cli.{where} = told
from backprop_gpu.__main__ import main
main()
"""
    done = run("evaluate", "nothing", code=130, command=[sys.executable, "-c", script])
    assert done.stdout == ""


def test_a_signal_in_the_end_of_a_run_that_fails_hides_nothing(folder):
    script = """
import os, signal
from backprop_gpu import loop
plain = loop.Loop._stop_at_whole_step
def stop(self, e):
    os.kill(os.getpid(), signal.SIGTERM)
    plain(self, e)
loop.Loop._stop_at_whole_step = stop
from backprop_gpu.__main__ import main
main()
"""
    args = "train", "--data", folder, "--layers", "4,3", "--output", "identity", "--optimizer", "sgd:lr=1e30"
    lines = run(*args, "--cost", "squared_error", code=143, command=[sys.executable, "-c", script]).stderr.splitlines()
    assert lines[0].startswith("backprop-gpu: training diverged in epoch ")
    assert lines[1].startswith("backprop-gpu: terminated ")


def test_what_is_noted_on_an_error_is_told_before_it(tmp_path, folder):
    args = "train", "--data", folder, "--layers", "4,3", "--output", "identity", "--optimizer", "sgd:lr=1e30"
    kept = "--save", tmp_path / "m", "--checkpoint-every", "1 step", "--batch-size", 1
    lines = run(*args, "--cost", "squared_error", *kept, code=1).stderr.splitlines()
    step = report.model(tmp_path / "m")["run"]["step"]
    assert lines[-3] == f"backprop-gpu: {tmp_path / 'm'} holds the run after step {step}"
    assert lines[-2].startswith("backprop-gpu: error: training diverged in epoch ")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_after_all_is_done(number, code):
    script = f"""
import atexit, os
atexit.register(os.kill, os.getpid(), {int(number)})
from backprop_gpu.__main__ import main
main()
"""
    assert run("--version", code=code, command=[sys.executable, "-c", script]).stderr == ""


def test_a_signal_that_is_ignored_stays_ignored(tmp_path, folder):
    """As nohup and shells do for what runs in the background."""
    script = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
from backprop_gpu import report
report.ProgressBar.on_step = lambda self, run: [os.kill(os.getpid(), n) for n in (signal.SIGINT, signal.SIGHUP)]
from backprop_gpu.__main__ import main
main()
"""
    command = [sys.executable, "-c", script]
    done = run("train", "--data", folder, "--layers", "4,3", "--epochs", 2, "--json", command=command)
    assert last_json(done)["epochs"] == 2


def test_a_terminal_that_goes_away_stops_and_saves(tmp_path):
    """SIGHUP comes then, from the kernel and again from the shell; and nobody hears what the program has to say."""
    command = [*COMMAND, "train", "--layers", "784,64,10", "--epochs", "1000", "--save", str(tmp_path / "m")]
    process, terminal = pty.fork()
    if not process:
        os.execv(command[0], [*command, "--checkpoint-every", "100 steps"])
    while not (tmp_path / "m").exists():
        assert os.read(terminal, 4096)
    os.close(terminal)
    with contextlib.suppress(ProcessLookupError):
        for _ in range(3):
            os.kill(process, signal.SIGHUP)
            time.sleep(2e-4)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 129
    assert report.model(tmp_path / "m")["run"]["step"] > 0


def test_the_model_that_a_run_begins_with_is_not_written_over(tmp_path, folder):
    args = "train", "--data", folder, "--layers", "4,3", "--epochs", 1
    run(*args, "--save", tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    (tmp_path / "link").symlink_to("m")
    refused(
        *args,
        "--pretrained",
        tmp_path / "m",
        "--save",
        tmp_path / "link",
        code=2,
        cause="would replace the model of --pre",
    )
    assert (tmp_path / "m").read_bytes() == before


def test_an_epoch_that_is_closed_after_a_resume_is_told_as_done(tmp_path, folder):
    """The steps of the last epoch were all taken, and in the file, when the process was killed."""
    script = """
import os, signal, sys
from backprop_gpu import loop
plain = loop.Loop._close
def close(self, *args):
    if self.run.epoch == self.run.epochs and "--resume" not in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(self, *args)
loop.Loop._close = close
from backprop_gpu.__main__ import main
main()
"""
    args = "train", "--data", folder, "--layers", "4,3", "--epochs", 2, "--batch-size", 1, "--save", tmp_path / "m"
    command = [sys.executable, "-c", script]
    run(*args, "--checkpoint-every", "1 step", command=command, code=-signal.SIGKILL)
    step = report.model(tmp_path / "m")["run"]["step"]
    done = run(*args, "--checkpoint-every", "1 step", "--resume", command=command)
    assert done.stderr == f"the run in {tmp_path / 'm'} went on after step {step}\nsaved to {tmp_path / 'm'}\n"
    assert "is over since" in run(*args, "--resume").stderr


def test_doctor_tells_of_the_machine_where_the_backend_that_is_asked_for_cannot_be():
    done = run("doctor", "--json", code=1, env={"BACKPROP_GPU_BACKEND": "cupy", "CUDA_VISIBLE_DEVICES": ""})
    cause, cure = done.stderr.splitlines()
    found = last_json(done)
    assert cause == f"backprop-gpu: error: {found['reason']}"
    assert cure.startswith("backprop-gpu: try: ")


def test_whoever_names_a_file_does_not_drive_the_terminal(tmp_path, folder):
    name = tmp_path / "a\x1b[2J\nb"
    done = run("train", "--data", folder, "--layers", "4,3", "--epochs", 1, "--save", name)
    assert done.stderr == f"saved to {tmp_path}/a\\x1b[2J\\nb\n"


def test_a_second_ctrl_c_saves_nothing_torn(tmp_path):
    """Two interrupts within one step: the network may be between two steps, so it is not saved as one."""
    script = """
import os, signal, sys
from backprop_gpu import cli, numpy_ops
plain, calls = numpy_ops.weight_gradient, []
def twice(*args):
    calls.append(1)
    for _ in range(2 if len(calls) == 5 else 0):  # two layers: in the third step
        os.kill(os.getpid(), signal.SIGINT)
    plain(*args)
numpy_ops.weight_gradient = twice
cli.main(sys.argv[1:])
"""
    command, eagerly = [sys.executable, "-c", script], {"BACKPROP_GPU_EXECUTOR": "eager"}
    done = run("train", "--epochs", 1, "--save", tmp_path / "m", code=130, command=command, env=eagerly)
    assert done.stderr == "backprop-gpu: interrupted in the middle of step 3; nothing saved\n"
    assert not (tmp_path / "m").exists()


def shell(line, *args, **kwargs):
    """A line of sh with "$0" for the command and "$@" for the arguments."""
    program = Path(sys.executable).parent / "backprop-gpu"
    return subprocess.run(
        ["sh", "-c", line, program, *map(str, args)], capture_output=True, text=True, timeout=60, check=False, **kwargs
    )


def test_closed_streams(tmp_path, folder):
    args = ["train", "--data", folder, "--epochs", 1, "--json", "--save", tmp_path / "m"]
    done = shell('"$0" "$@" 2>&-', *args)
    assert done.returncode == 0
    assert json.loads(done.stdout)["epochs"] == 1  # nothing but the JSON
    done = shell('"$0" "$@" 2>&-', "train", "--data", "nowhere", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    for command in (args, ["doctor"], ["--version"]):
        done = shell('"$0" "$@" >&-', *command)
        assert "Traceback" not in done.stderr
        assert "unexpected" not in done.stderr
    (tmp_path / "m").unlink()
    done = shell('"$0" "$@" >/dev/full', *args)
    assert done.returncode == 1
    assert "stdout: No space left on device" in done.stderr
    assert "report this bug" not in done.stderr
    assert bp.load(tmp_path / "m", "numpy").layers == [4, 512, 3]  # saved before anything could go wrong


def test_bad_test_data_is_found_before_the_training(tmp_path):
    arrays = {
        "x_train": np.ones((6, 2)),
        "y_train": np.arange(6) % 2,
        "x_test": np.ones((2, 2)),
        "y_test": np.array([0, 5]),
    }
    np.savez(tmp_path / "d.npz", **arrays)
    start_time = time.monotonic()
    refused(
        "train",
        "--data",
        tmp_path / "d.npz",
        "--epochs",
        10**6,
        code=1,
        cause="labels must be in 0..1, found 5 at row 1",
    )
    assert time.monotonic() - start_time < 60


def test_a_label_far_out_is_bad_data(tmp_path):
    for label in (3_000_000, 2**64 - 1):
        np.savez(tmp_path / "d.npz", x_train=np.ones((3, 2)), y_train=np.array([0, 1, label], np.uint64))
        refused("train", "--data", tmp_path / "d.npz", code=1, cause=f"label {label} at row 2")


def test_many_classes_are_fine_where_the_layers_say_so(tmp_path):
    np.savez(tmp_path / "d.npz", x_train=np.ones((3, 2)), y_train=np.array([0, 1, 70_000]))
    assert (
        last_json(run("train", "--data", tmp_path / "d.npz", "--layers", "2-70001", "--epochs", 1, "--json"))["steps"]
        == 1
    )


def test_control_characters_do_not_reach_the_terminal(tmp_path):
    refused("train", "--data", "a\nb\x1b[31m.npz", code=1, cause=r"a\nb\x1b[31m.npz", cwd=tmp_path)


def test_no_command():
    refused(code=2, cause="Missing command")


@pytest.mark.parametrize(("variable", "value"), [("BACKPROP_GPU_BACKEND", "bogus"), ("BACKPROP_GPU_DEVICE", "x")])
def test_variables_that_make_no_sense(folder, variable, value):
    env = {variable: value}
    if variable == "BACKPROP_GPU_DEVICE":
        env["BACKPROP_GPU_BACKEND"] = "cupy"
    refused("train", "--data", folder, code=2, cause=variable, env=env)


def test_warnings_are_one_line(folder):
    done = run("train", "--data", folder, "--epochs", 1, "--batch-size", 1000)
    assert done.stderr == "backprop-gpu: warning: batch_size 1000 is more than the 6 samples: each batch holds all\n"
    refused(
        "train", "--data", folder, "--batch-size", 1000, code=1, cause="UserWarning: ", env={"PYTHONWARNINGS": "error"}
    )


def test_a_closed_pipe_is_quiet(tmp_path, folder):
    run("train", "--data", folder, "--epochs", 1, "--save", tmp_path / "m")
    np.save(tmp_path / "x.npy", np.ones((100_000, 4)))
    with start("predict", tmp_path / "m", tmp_path / "x.npy") as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
    assert err == ""


def test_a_progress_bar_on_a_terminal_alone(folder):
    """stderr is a terminal here; it shows the epochs, and stdout has nothing of it."""
    ours, theirs = pty.openpty()
    with start_on_terminal(theirs, "train", "--data", folder, "--epochs", 3) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:
                break
            if not piece:
                break
            shown += piece
        out = process.stdout.read()
    os.close(ours)
    assert process.wait() == 0
    assert b"epoch 3/3" in shown
    assert b"epoch 3/3" not in out
    assert b"test cost" in out
    assert run("train", "--data", folder, "--epochs", 1).stderr == ""


def start_on_terminal(terminal, *args):
    return subprocess.Popen([*COMMAND, *map(str, args)], stdout=subprocess.PIPE, stderr=terminal)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_narrow_terminals(folder, encoding):
    env = {"PYTHONIOENCODING": encoding, "NO_COLOR": "1"}
    for args in (["train", "--data", folder, "--epochs", 1], ["doctor"], ["train", "--help"]):
        assert run(*args, env=env).stdout


def test_non_ascii_paths(tmp_path):
    place = tmp_path / "Zahlen äöü 数字"
    place.mkdir()
    write_idx_directory(place)
    run("train", "--data", place, "--epochs", 1, "--save", place / "modèle")
    assert run("evaluate", place / "modèle", "--data", place, env={"PYTHONIOENCODING": "ascii"}).stdout
    refused("train", "--data", "数字", code=1, cause="there is no dataset", env={"PYTHONIOENCODING": "ascii"})
