"""The adapter for the lm-evaluation-harness, on tasks from a directory."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mot_jax import cli
from mot_jax.config import Config, DenseConfig, ModelConfig
from mot_jax.data.tokenizers import ByteTokenizer
from mot_jax.errors import UserError
from mot_jax.inference.language_model import LanguageModel
from mot_jax.nn.transformer import init_params
from mot_jax.runs import restore

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from mot_jax.interop import lm_eval

pytestmark = pytest.mark.slow  # the harness first indexes all of its own tasks

MODEL = ModelConfig(1, 16, 32, 2, context_length=64, loss_chunk=64, feed_forward=DenseConfig())
QUESTIONS = [
    {"question": "The sky is", "choices": ["blue", "a long way down", "b"], "answer": 0},
    {"question": "import", "choices": ["os", "return"], "answer": 1},
    {"question": "x" * 100, "choices": ["y", "z" * 70], "answer": 0},
]
WRITING = [{"prompt": "def f(", "answer": "x"}, {"prompt": "import " * 20, "answer": "os"}]
TEXTS = [{"text": "".join(map(chr, range(40, 120))) * 2}, {"text": "a short one"}]
TASKS = {
    "choosing": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "writing": """
output_type: generate_until
doc_to_text: prompt
doc_to_target: answer
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory of task files and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    for (name, definition), rows in zip(TASKS.items(), (QUESTIONS, WRITING, TEXTS), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(data)}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + definition)
    return str(folder)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: init_params(MODEL, key), jax.random.key(0))
    params = {name: jnp.asarray(rng.normal(0, 0.5, shape.shape), shape.dtype) for name, shape in shapes.items()}
    params["head"] = params["head"].at[:, 128:].set(0)  # the generated text is ASCII
    return LanguageModel(Config(model=MODEL), params, ByteTokenizer(), "grouped", 0)


@pytest.fixture(scope="module")
def results(directory, model) -> dict:
    """The results of all tasks in one evaluation."""
    return lm_eval.evaluate(model, list(TASKS), include_path=directory)


def test_multiple_choice(results, model):
    pairs = [(row["question"], " " + choice) for row in QUESTIONS for choice in row["choices"]]
    likelihoods = iter(model.log_likelihoods(pairs))
    right, right_by_length = 0, 0
    for row in QUESTIONS:
        log_probs = [next(likelihoods).log_prob for _ in row["choices"]]
        right += int(np.argmax(log_probs)) == row["answer"]
        by_length = [x / len(choice) for x, choice in zip(log_probs, row["choices"], strict=True)]
        right_by_length += int(np.argmax(by_length)) == row["answer"]
    assert results["results"]["choosing"]["acc,none"] == pytest.approx(right / 3)
    assert results["results"]["choosing"]["acc_norm,none"] == pytest.approx(right_by_length / 3)
    assert results["n-samples"]["choosing"]["effective"] == 3


def test_rolling(results, model):
    bits = -sum(model.log_likelihoods([("", row["text"])])[0].log_prob for row in TEXTS) / math.log(2)
    size = sum(len(row["text"]) for row in TEXTS)
    assert results["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(bits / size)


class Request:
    def __init__(self, *args):
        self.args = args


def test_generated_text_ends_before_the_first_stop(results, model):
    assert results["results"]["writing"]["exact_match,none"] in (0, 0.5, 1)
    harness = lm_eval.HarnessModel(model)
    (free,) = harness.generate_until([Request("def f(", {"max_gen_toks": 12})])
    assert free == model.generate(["def f("], max_tokens=12, temperature=0)[0].text
    stops = [free[7:9], free[3:5]]
    stopped = harness.generate_until(
        [Request("def f(", {"until": stops, "max_gen_toks": 12}), Request("def f(", {"max_gen_toks": 5})]
    )
    assert stopped == [min((free.split(stop)[0] for stop in stops), key=len), free[:5]]
    # A long prompt is cut so that the answer fits into the context.
    long = "".join(chr(40 + i % 60) for i in range(99))
    options = {"max_gen_toks": 12, "temperature": 0.0}
    assert harness.generate_until([Request(long, options)]) == harness.generate_until([Request(long[-52:], options)])
    drawn = harness.generate_until([Request("def f(", {"max_gen_toks": 12, "do_sample": True})] * 9)
    assert len(set(drawn)) > 4


def test_scores_follow_the_conventions_of_the_harness(model):
    """A space between context and continuation belongs to the latter; an empty context is the end of a text."""
    harness = lm_eval.HarnessModel(model, batch_size="auto")
    pairs = [("The sky is ", "blue"), ("", "x"), ("a", "bc")]
    expected = model.log_likelihoods([("The sky is", " blue"), ("", "x"), ("a", "bc")])
    assert harness.loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True) == [tuple(x) for x in expected]


def test_the_arguments_of_the_harness_for_batches_and_devices(finished):
    arguments = {"workdir": str(finished), "mode": "companions"}
    harness = lm_eval.MotJax.create_from_arg_obj(
        arguments, {"batch_size": "auto:4", "max_batch_size": 2, "device": "cpu:1"}
    )
    assert harness.batch_size == 2 and harness.model.params["head"].devices() == {jax.devices()[1]}
    text = harness.generate_until([Request("import", {"max_gen_toks": 3})], disable_tqdm=True)
    assert text == lm_eval.MotJax(**arguments).generate_until(
        [Request("import", {"max_gen_toks": 3})], disable_tqdm=True
    )
    for wrong, words in (({"batch_size": "many"}, "batch_size = 'many'"), ({"device": "cuda:0"}, "no such device")):
        with pytest.raises(UserError, match=words):
            lm_eval.MotJax(**arguments, **wrong)


def test_invalid_tasks_and_options_are_errors_of_one_line(directory, model, tmp_path):
    definition = (
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: /no/such.jsonl}}\ntest_split: test"
    )
    (tmp_path / "broken.yaml").write_text(definition + TASKS["choosing"])
    with pytest.raises(UserError, match=r"--tasks = broken: cannot be loaded \(.*such"):
        lm_eval.evaluate(model, ["broken"], include_path=str(tmp_path))
    with pytest.raises(UserError, match=r"'choosin': no such task; did you mean 'choosing'"):
        lm_eval.evaluate(model, ["choosin"], include_path=directory)
    with pytest.raises(UserError, match=r"generation_kwargs.num_beams: no such option"):
        lm_eval.HarnessModel(model).generate_until([Request("x", {"num_beams": 4})])


def test_modes_with_dependent_sequences_print_a_warning(model, capsys):
    lm_eval.HarnessModel(model)
    assert capsys.readouterr().err == ""
    lm_eval.HarnessModel(dataclasses.replace(model, config=Config()))
    assert "warning: in mode grouped a score depends on the requests" in capsys.readouterr().err


def test_the_command(directory, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(restore, "load_run_config", lambda workdir: model.config)
    monkeypatch.setattr(cli.models, "_model", lambda options, config: model)
    file = tmp_path / "results.json"
    options = ["--include-path", directory, "--limit", "2", "--batch-size", "auto:4", "--json", str(file)]
    cli.main(["lm-eval", "runs/x", "--tasks", "choos*,rolling", *options])
    output = capsys.readouterr().out
    assert all(f"|{word}" in output for word in ("choosing", "rolling", "bits_per_byte"))
    results = json.loads(file.read_text())
    assert set(results["results"]) == {"choosing", "rolling"} and results["n-samples"]["choosing"]["effective"] == 2
    assert results["batch_size"] == "auto:4"
    assert (results["workdir"], results["mode"], results["step"], results["limit"]) == ("runs/x", "grouped", 0, 2)


@pytest.mark.parametrize("size", ["0", "-1", "2.5", "auto4", "auto:many"])
def test_the_command_refuses_other_batch_sizes(size, model, monkeypatch, capsys):
    monkeypatch.setattr(restore, "load_run_config", lambda workdir: model.config)
    monkeypatch.setattr(cli.models, "_model", lambda options, config: pytest.fail("the model is loaded"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["lm-eval", "runs/x", "--tasks", "choosing", f"--batch-size={size}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: --batch-size = ") and line.endswith("try 8")
