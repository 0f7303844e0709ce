"""The clip-lab command: what it prints where, its exit codes, and what it says about mistakes."""
import json
import subprocess
import sys

from PIL import Image
import pytest
from typer.testing import CliRunner

from clip_lab.efficientnet import installed
from clip_lab import cli

RUN = CliRunner()


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "orange.png"
    Image.new("RGB", (80, 60), "#E69F00").save(path)
    return path


def run(*arguments, **options):
    return RUN.invoke(cli.app, [str(a) for a in arguments], prog_name="clip-lab", **options)


def shell(*arguments):
    "The command as a process of its own, without a terminal."
    return subprocess.run([sys.executable, "-c", "from clip_lab.cli import main; main()", *map(str, arguments)], capture_output=True, text=True, timeout=300)


def test_help_is_there_without_loading_torch():
    "Torch takes seconds to import; this is the reason why the commands import inside their bodies."
    code = "import sys\nfrom clip_lab.cli import app\ntry: app(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("classify", "models", "demo", "Exit codes"): assert word in done.stdout


def test_version():
    from clip_lab import __version__
    assert run("--version").stdout == f"clip-lab {__version__}\n"


def test_classify_prints_every_picture_and_its_best_answers(picture):
    done = run("classify", picture, picture, "--labels", "a cat,a dog", "-l", "an orange", "--top", 2)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("orange.png") == 2 and done.stdout.count("cosine") == 4 and "%" in done.stdout


def test_json_is_the_answer_of_the_library(picture):
    from clip_lab.evals.zeroshot import classify
    from clip_lab.pretrained import load
    told = json.loads(run("classify", picture, "-l", "a cat,a dog", "-t", "{}", "-t", "an emoji of {}", "--json").stdout)
    assert told["templates"] == ["{}", "an emoji of {}"] and told["model"] == "emoji" and len(told["weights"]) == 16
    expected = classify(*load(), str(picture), ["a cat", "a dog"], ["{}", "an emoji of {}"])
    answers = told["pictures"][0]["answers"]
    assert [a["label"] for a in answers] == expected.classname.tolist()
    assert [a["probability"] for a in answers] == pytest.approx(expected.probability.tolist(), abs=1e-5)


def test_an_unreadable_picture_stops_nobody(picture, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    done = shell("classify", broken, picture, tmp_path / "missing.png", "-l", "a cat,a dog", "--json")
    assert done.returncode == 1
    first, second, third = json.loads(done.stdout)["pictures"]
    assert "not a picture" in first["error"] and len(second["answers"]) == 2 and "does not exist" in third["error"]
    assert done.stderr.count("clip-lab: ") == 2 and "Traceback" not in done.stderr


@pytest.fixture
def folder(picture, tmp_path):
    "Two pictures, one of them a level deeper, beside files that are none."
    home = tmp_path / "holidays"
    (home / "beach").mkdir(parents=True)
    for name in ("a.png", "beach/b.PNG"): (home / name).write_bytes(picture.read_bytes())
    for name in ("notes.txt", "beach/IMG_1.HEIC", ".hidden"): (home / name).write_text("x")
    return home


def test_a_folder_means_the_pictures_in_it(folder):
    done = shell("classify", folder, "-l", "a cat,a dog", "--top", 1)
    assert done.returncode == 0, done.stderr
    assert [line.removeprefix(f"{folder}/") for line in done.stdout.splitlines() if line.startswith(str(folder))] == ["a.png", "beach/b.PNG"]
    assert done.stderr == "clip-lab: 2 files are no pictures and were skipped: IMG_1.HEIC, notes.txt\n"


def test_folders_files_and_patterns_together(folder, picture, monkeypatch):
    monkeypatch.chdir(folder)
    told = json.loads(run("classify", "*.png", "beach", picture, "-l", "a cat,a dog", "--json").stdout)
    assert [p["picture"] for p in told["pictures"]] == ["a.png", "beach/b.PNG", str(picture)] and told["skipped"] == ["beach/IMG_1.HEIC"]
    (folder / "[1].png").write_bytes(picture.read_bytes())                     # a name that looks like a pattern is a name
    assert json.loads(run("classify", "[1].png", "-l", "a cat,a dog", "--json").stdout)["pictures"][0]["picture"] == "[1].png"


def test_a_corrupt_picture_in_a_folder_is_told_like_any_other(folder):
    (folder / "broken.jpg").write_text("no picture")
    done = shell("classify", folder, "-l", "a cat,a dog", "--json")
    assert done.returncode == 1 and len(json.loads(done.stdout)["pictures"]) == 3 and "broken.jpg is not a picture" in done.stderr


def test_labels_from_a_file_and_from_standard_input(picture, tmp_path):
    file = tmp_path / "labels.txt"
    file.write_text("salt, and pepper\n\na dog\n")
    told = json.loads(run("classify", picture, "--labels-file", file, "--json").stdout)
    assert told["labels"] == ["salt, and pepper", "a dog"]
    told = json.loads(run("classify", picture, "--labels-file", "-", "--json", input="a cat\na dog\n").stdout)
    assert told["labels"] == ["a cat", "a dog"]


@pytest.mark.parametrize("arguments, message", [
    (["classify", "x.png"], "There are no labels yet"),
    (["classify", "-l", "cat"], "Missing argument"),
    (["classify", "x.png", "-l", "cat,Cat"], "Label 2, 'Cat', repeats label 1"),
    (["classify", "x.png", "-l", "cat", "-t", "a photo"], "needs exactly one {}"),
    (["classify", "x.png", "-l", "cat", "-t", "{}", "--template-set", "paper"], "not both"),
    (["classify", "x.png", "-l", "cat", "--template-set", "photos"], "'photos' is not one of paper"),
    (["classify", "x.png", "--labels-file", "nowhere.txt"], "nowhere.txt cannot be read"),
    (["classify", "x.png", "-l", "cat", "--device", "abacus"], "'abacus' is not a device"),
    (["classify", "x.png", "-l", "cat", "--top", "0"], "--top"),
    (["classify", "nowhere/*.png", "-l", "cat"], "no file is called like nowhere/*.png"),
    (["clasify"], "Did you mean 'classify'"),
], ids=lambda x: None if isinstance(x, list) else x)
def test_a_wrong_command_line_is_exit_code_2(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2 and done.stdout == ""
    assert message in " ".join(done.stderr.split())


def test_photographs_for_a_model_that_has_seen_drawings_get_a_hint(picture, tmp_path):
    "Answers about photographs look as certain as any others."
    Image.open(picture).save(tmp_path / "photo.JPG")
    done = shell("classify", tmp_path / "photo.JPG", picture, "-l", "a cat,a dog", "--json")
    assert done.returncode == 0 and done.stderr == "clip-lab: the model emoji has seen drawings only; for photographs, add --model photos\n"


def test_no_line_of_the_command_list_is_cut_off():
    lines = run("--help").stdout.partition("Commands:")[2].partition("Exit codes")[0]
    assert "classify" in lines and "..." not in lines


def test_a_folder_without_a_picture_is_exit_code_2(tmp_path):
    (tmp_path / "holiday.heic").touch()
    done = run("classify", tmp_path, "-l", "cat,dog")
    assert done.exit_code == 2 and done.stdout == "" and "has no pictures" in done.stderr and "holiday.heic" in " ".join(done.stderr.split())


def test_an_unknown_model_is_one_line_and_exit_code_1(picture):
    done = shell("classify", picture, "-l", "cat,dog", "--model", "ViT-B32")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("clip-lab: ") and "did you mean 'ViT-B/32'" in done.stderr and "Traceback" not in done.stderr


def test_models_says_what_is_here(monkeypatch, tmp_path):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = run("models").stdout.splitlines()
    assert len(lines) == 12 and lines[1].split()[0] == "emoji" and lines[1].split()[-1] == "yes"
    here = {line.split()[0]: line.split()[-1] for line in lines[2:]}
    assert here.pop("photos") == ("yes" if installed("efficientnet-lite0") else "no") and set(here.values()) == {"no"}
    assert "151 M" in next(line for line in lines if line.startswith("ViT-B/32"))


@pytest.mark.slow
def test_the_demo_ends_by_itself_without_a_terminal():
    done = shell("demo")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("n = 1,000)") == 4 and "95 % intervals" in done.stdout and "127.0.0.1" not in done.stdout
    assert "%|" not in done.stderr                    # no progress bars
