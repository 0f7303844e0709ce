"""Tiny data sets in their customary layouts, read and compared with what was written; and what a wrong layout is told.

The layouts are those that torchvision's data sets and clip-benchmark expect; where a comment says "re-stated", the rule was written down again here
from that code or from memory of it, because torchvision cannot be imported beside this project's torch.
"""
import gzip
import io
import json
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from clip_lab.data import hubs, sets
from clip_lab.data.arrays import idx, safe_pickle
from clip_lab.data.found import LayoutError, Row, Stored, StoredPictures, draw_splits, gather, pixels
from clip_lab.data.registry import card, cards, words
from clip_lab.data.sets import LAYOUTS, check_set, find_set, form_of, list_sets, open_set, show_set


def colour(seed: int) -> tuple[int, int, int]:
    return tuple(int(v) for v in np.random.default_rng(seed).integers(0, 256, 3))


def draw(root: Path, *paths: str) -> None:
    for i, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), colour(i)).save(root / path)


def write(root: Path, **files) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def encoded(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def answers(data, split="test", question=None):
    """What a data set says, in words: file -> class."""
    pictures, labels = data.split(split, question)
    return dict(zip(pictures.table.file, (data.target(question).classnames[i] for i in labels)))


# ------------------------------------------------------------------------------------------------ every reader, on what is not its layout

@pytest.mark.parametrize("name", sorted(cards()))
@pytest.mark.parametrize("content", ["empty", "archive", "unrelated"])
def test_a_wrong_layout_says_what_was_expected_and_found(name, content, tmp_path):
    if content == "archive": (tmp_path / "download.tar").write_bytes(b"")
    if content == "unrelated": draw(tmp_path, "holiday/beach.jpg"); (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(LayoutError) as error: open_set(name, tmp_path)
    said = str(error.value)
    assert f"Expected of {name}: " in said and str(tmp_path) in said or "unknown: 'holiday'" in said
    assert {"empty": "empty folder", "archive": "download.tar", "unrelated": "holiday"}[content] in said


def test_one_level_too_deep(tmp_path):
    draw(tmp_path, "eurosat-master/AnnualCrop/1.jpg")
    with pytest.raises(LayoutError, match="unknown: 'eurosat-master'.*AnnualCrop"): open_set("eurosat", tmp_path)


# ------------------------------------------------------------------------------------------------ folders of classes

def test_image_folder_as_torchvision_numbers_it(tmp_path):
    """Re-stated: classes are the sorted folder names, pictures at any depth, other files left out."""
    draw(tmp_path, "b/1.png", "a/deep/er/2.PNG", "a/1.jpeg", "C/3.webp"); write(tmp_path, **{"a/readme.md": "x"})
    data = open_set(tmp_path)
    assert data.target().classnames == sorted(["a", "b", "C"]) == ["C", "a", "b"]
    assert data.data.table.file.tolist() == ["C/3.webp", "a/1.jpeg", "a/deep/er/2.PNG", "b/1.png"] and data.target().labels.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("folder, split", [("val", "test"), ("validation", "test"), ("test", "test")])
def test_names_of_split_folders(folder, split, tmp_path):
    draw(tmp_path, "train/a/1.png", f"{folder}/a/2.png", f"{folder}/b/3.png")
    data = open_set(tmp_path)
    assert list(answers(data)) == [f"{folder}/a/2.png", f"{folder}/b/3.png"] and list(answers(data, "train")) == ["train/a/1.png"]


def test_imagenet_by_folder_and_its_subsets(tmp_path):
    draw(tmp_path, "train/n01440764/1.JPEG", "val/n01440764/2.JPEG", "val/n01498041/3.JPEG", "val/n01443537/4.JPEG")
    data = open_set("ImageNet", tmp_path)
    assert list(answers(data, question="class").values()) == ["tench", "goldfish", "stingray"]
    assert list(answers(data, question="class of imagenet-a").values()) == ["stingray"]          # re-stated from clip-benchmark's lists
    assert list(answers(data, question="class of imagenet-r").values()) == ["goldfish", "stingray"]
    draw(tmp_path / "a", "imagenet-a/n01498041/1.jpg")
    hard = open_set("imagenet-a", tmp_path / "a")
    assert hard.shift_of == "imagenet" and list(hard.targets) == ["class of imagenet-a"]
    assert hard.target().classnames == data.target("class of imagenet-a").classnames
    (tmp_path / "flat" / "val").mkdir(parents=True); draw(tmp_path / "flat", "val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(LayoutError, match="found val/|unknown: 'val'"): open_set("imagenet", tmp_path / "flat")


def test_imagenetv2_numbers_are_not_sorted_as_text(tmp_path):
    draw(tmp_path, *(f"imagenetv2-matched-frequency-format-val/{i}/x.jpeg" for i in range(12)))
    data = open_set("imagenetv2", tmp_path)
    told = {Path(f).parent.name: n for f, n in answers(data).items()}
    assert told == {str(i): words("imagenet").classnames[i] for i in range(12)}
    draw(tmp_path / "more", *(f"{i}/x.jpeg" for i in (3, 1000)))
    with pytest.raises(LayoutError, match="unknown: '1000'"): open_set("imagenetv2", tmp_path / "more")


def test_caltech_and_countries_by_place(tmp_path):
    folders = ["BACKGROUND_Google", "Faces", *(f"class_{i:03d}" for i in range(100))]
    draw(tmp_path / "caltech101", *(f"101_ObjectCategories/{f}/image_0001.jpg" for f in folders))
    data = open_set("caltech101", root=tmp_path)
    assert data.facts["names of class"] == "by place" and data.target().classnames[data.target().labels[0]] == "background" and data.target().metric == "mean per class"
    draw(tmp_path / "country211", *(f"{s}/C{i:03d}/1.jpg" for s in ("train", "valid", "test") for i in range(211)))
    places = open_set("country211", root=tmp_path)
    assert {s: len(p) for s, p in places.target().splits.items()} == {"train": 211, "validation": 211, "test": 211}
    assert places.target().classnames[:2] == ["Andorra", "United Arab Emirates"]


def test_objectnet_with_its_four_files(tmp_path):
    root = tmp_path / "objectnet-1.0"
    draw(root, "images/air_freshener/1.png", "images/chair/2.png", "images/tie_rack/3.png", "images/alarm_clock/4.png")
    write(root, **{"mappings/folder_to_objectnet_label.json": json.dumps({"air_freshener": "Air freshener", "chair": "Chair", "tie_rack": "Tie rack", "alarm_clock": "Alarm clock"}),
                   "mappings/objectnet_to_imagenet_1k.json": json.dumps({"Chair": "rocking chair; folding chair", "Alarm clock": "analog clock"}),
                   "mappings/pytorch_to_imagenet_2012_id.json": json.dumps({"765": 0, "559": 1, "409": 2}),
                   "mappings/imagenet_to_label_2012_v2": "rocking chair\nfolding chair\nanalog clock\n"})
    data = open_set("objectnet", tmp_path)
    assert answers(data) == {"alarm_clock/4.png": "alarm clock", "chair/2.png": "chair"}
    assert data.facts["imagenet places"] == {"chair": [765, 559], "alarm clock": [409]}
    assert [words("imagenet").classnames[i] for i in (765, 559, 409)] == ["rocking chair", "folding chair", "analog clock"]


def test_lists(tmp_path):
    draw(tmp_path / "dtd", "images/banded/banded_0002.jpg", "images/dotted/dotted_0001.jpg", "images/dotted/dotted_0002.jpg")
    write(tmp_path / "dtd", **{"labels/train1.txt": "banded/banded_0002.jpg\n", "labels/val1.txt": "dotted/dotted_0001.jpg\n", "labels/test1.txt": "dotted/dotted_0002.jpg\n"})
    data = open_set("dtd", root=tmp_path)
    assert answers(data) == {"dotted/dotted_0002.jpg": "dotted"} and answers(data, "train") == {"banded/banded_0002.jpg": "banded"}
    draw(tmp_path / "birdsnap", "download/images/Acadian_Flycatcher/1.jpg", "download/images/Acorn_Woodpecker/2.jpg")
    write(tmp_path / "birdsnap", **{"test_images.txt": "path\nAcorn_Woodpecker/2.jpg\n"})
    birds = open_set("birdsnap", root=tmp_path)
    assert answers(birds) == {"Acorn_Woodpecker/2.jpg": "Acorn Woodpecker"} and birds.target().templates is None
    draw(tmp_path / "sun397", "SUN397/a/abbey/sun_1.jpg", "SUN397/a/abbey/sun_2.jpg", "SUN397/b/bar/sun_3.jpg")
    write(tmp_path / "sun397", **{"SUN397/Training_01.txt": "/a/abbey/sun_1.jpg\n", "SUN397/Testing_01.txt": "/a/abbey/sun_2.jpg\n/b/bar/sun_3.jpg\n"})
    assert list(answers(open_set("sun397", root=tmp_path)).values()) == ["abbey", "bar"]
    (tmp_path / "sun397/SUN397/b/bar/sun_3.jpg").unlink()
    with pytest.raises(LayoutError, match="1 of 3 listed pictures are missing, such as b/bar/sun_3.jpg"): open_set("sun397", root=tmp_path)
    write(tmp_path / "sun397", **{"SUN397/Training_01.txt": "/b/bar/sun_4.jpg\n"}); draw(tmp_path / "sun397", "SUN397/b/bar/sun_4.jpg")
    assert open_set("sun397", root=tmp_path, allow_missing=True).facts["missing"] == 1
    write(tmp_path / "sun397", **{"SUN397/Training_01.txt": "/a/abbey/sun_2.jpg\n/b/bar/sun_4.jpg\n"})
    with pytest.raises(LayoutError, match="1 picture is in train and in test"): open_set("sun397", root=tmp_path, allow_missing=True)


def test_frames_without_lists(tmp_path):
    draw(tmp_path, "train/playing_guitar/1.jpg", "val/playing_guitar/2.jpg", "val/air_drumming/3.jpg")
    data = open_set("kinetics700", tmp_path)
    assert answers(data) == {"val/air_drumming/3.jpg": "air drumming", "val/playing_guitar/2.jpg": "playing guitar"} and data.target().metric == "mean of top-1 and top-5"


# ------------------------------------------------------------------------------------------------ tables

def test_pets_numbers_agree_with_the_published_order(tmp_path):
    """The annotation files count classes from 1 in this order (re-stated); each published name must be reached by its file's spelling."""
    names = words("pets").classnames
    files = [f"{n.replace(' ', '_') if n[0] in 'AB' else n.replace(' ', '_').lower()}_1" for n in names]
    draw(tmp_path, *(f"images/{f}.jpg" for f in files))
    write(tmp_path, **{"annotations/trainval.txt": "", "annotations/test.txt": "".join(f"{f} {i} 1 1\n" for i, f in enumerate(files, 1))})
    assert open_set("pets", tmp_path).target().labels.tolist() == list(range(37))


def test_voc_faults(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2007"
    draw(root, "JPEGImages/1.jpg", "JPEGImages/2.jpg")
    write(root, **{"ImageSets/Main/trainval.txt": "1\n", "ImageSets/Main/test.txt": "2\n", "Annotations/1.xml": "<annotation><object><name>cow</name></object></annotation>", "Annotations/2.xml": "<annotation>"})
    with pytest.raises(LayoutError, match="2.xml is not readable XML"): open_set("voc2007", tmp_path)
    write(root, **{"Annotations/2.xml": "<annotation><object><name>unicorn</name></object></annotation>"})
    with pytest.raises(LayoutError, match="class 'unicorn' is used but not among the 20 classes"): open_set("voc2007", tmp_path)
    (root / "Annotations/2.xml").unlink()
    with pytest.raises(LayoutError, match="expected Annotations/2.xml"): open_set("voc2007", tmp_path)


def test_gtsrb_in_the_layout_of_its_own_archives(tmp_path):
    draw(tmp_path, "GTSRB/Final_Training/Images/00000/a.ppm", "GTSRB/Final_Test/Images/00000.ppm")
    write(tmp_path, **{"GT-final_test.csv": "Filename;ClassId\n00000.ppm;99\n"})
    with pytest.raises(LayoutError, match="unknown: '99'; the registry knows 43"): open_set("gtsrb", tmp_path)
    write(tmp_path, **{"GT-final_test.csv": "Filename,ClassId\n00000.ppm,1\n"})
    with pytest.raises(LayoutError, match="expected the columns Filename, ClassId"): open_set("gtsrb", tmp_path)


def test_fer_folders_and_faults(tmp_path):
    draw(tmp_path / "a", "train/angry/1.png", "test/surprise/2.png")
    assert list(answers(open_set("fer2013", tmp_path / "a")).values()) == ["surprised"]
    write(tmp_path / "b", **{"fer2013.csv": "emotion,pixels,Usage\n7,1 2 3,Training\n"})
    with pytest.raises(LayoutError, match="picture 0: emotion '7', 3 pixels"): open_set("fer2013", tmp_path / "b")


def test_celeba_from_kaggles_csv(tmp_path):
    draw(tmp_path, "img_align_celeba/1.jpg", "img_align_celeba/2.jpg", "img_align_celeba/3.jpg")
    write(tmp_path, **{"list_attr_celeba.csv": "image_id,Male,Smiling\n1.jpg,-1,1\n2.jpg,1,1\n3.jpg,1,-1\n", "list_eval_partition.csv": "image_id,partition\n1.jpg,2\n2.jpg,0\n3.jpg,1\n"})
    data = open_set("celeba", tmp_path)
    assert (answers(data), answers(data, "train"), answers(data, "validation")) == ({"1.jpg": "female"}, {"2.jpg": "male"}, {"3.jpg": "male"})
    write(tmp_path, **{"list_eval_partition.csv": "image_id,partition\n1.jpg,2\n"})
    with pytest.raises(LayoutError, match="2 pictures are in no split, such as 2.jpg"): open_set("celeba", tmp_path)


def test_captions_of_coco_and_flickr(tmp_path):
    draw(tmp_path / "coco", "val2014/a.jpg", "val2014/b.jpg")
    whole = {"images": [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}], "annotations": [{"image_id": 3, "caption": "Third. "}, {"image_id": 7, "caption": "Seventh."}, {"image_id": 3, "caption": "Again."}]}
    write(tmp_path / "coco", **{"coco_test_karpathy.json": json.dumps(whole)})
    assert open_set("coco", root=tmp_path).captions == [["Seventh."], ["Third.", "Again."]]
    draw(tmp_path / "flickr30k", "flickr30k-images/1.jpg", "flickr30k-images/2.jpg")
    write(tmp_path / "flickr30k", **{"dataset_flickr30k.json": json.dumps({"images": [dict(filename=f"{i}.jpg", split=s, sentences=[{"raw": s}]) for i, s in ((1, "test"), (2, "val"))]})})
    data = open_set("flickr30k", root=tmp_path)
    assert data.captions == [["test"], ["val"]] and data.data.table.split.tolist() == ["test", "validation"] and not data.targets
    assert check_set("flickr30k", root=tmp_path).table.set_index("what").verdict["test pictures"] == "differs"


def test_cars_and_flowers_faults(tmp_path):
    for name in ("imagelabels", "setid"): (tmp_path / f"{name}.mat").write_bytes(b"MATLAB 5.0 but then nothing")
    with pytest.raises(LayoutError, match="imagelabels.mat is not a readable Matlab file"): open_set("flowers", tmp_path)
    savemat(tmp_path / "imagelabels.mat", {"labels": [[1, 2]]}); savemat(tmp_path / "setid.mat", {"trnid": [[1]], "valid": [[2]]})
    with pytest.raises(LayoutError, match="expected trnid, valid, tstid; found trnid, valid"): open_set("flowers", tmp_path)
    savemat(tmp_path / "setid.mat", {"trnid": [[1]], "valid": [[2]], "tstid": [[3]]})
    with pytest.raises(LayoutError, match="names picture 3; imagelabels.mat has labels 1 to 2"): open_set("flowers", tmp_path)


# ------------------------------------------------------------------------------------------------ arrays

@pytest.mark.parametrize("evil", [b"cos\nsystem\n(S'touch was-run'\ntR.", b"cbuiltins\neval\n(S'1'\ntR.", b"cnumpy\nload\n(S'x'\ntR.", b"cnumpy.core.multiarray\nfromfile\n.", b"\x80\x04\x8c\x05posix\x8c\x06system\x93."])
def test_no_pickle_runs_anything(evil, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_bytes(evil)
    with pytest.raises(LayoutError, match="which no array needs"): safe_pickle(tmp_path / "x")
    assert not (tmp_path / "was-run").exists()


def test_pickles_of_python_2(tmp_path):
    """CIFAR's own files: protocol 2, numpy 1 names, text as bytes; rebuilt here by hand, opcode by opcode."""
    payload = (b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x01K\x03\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87R"
               b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x03\x01\x02\xfftbU\x06labelsq\x07]q\x08K\x05au.")
    (tmp_path / "b").write_bytes(payload)
    found = safe_pickle(tmp_path / "b")
    assert found["data"].tolist() == [[1, 2, 255]] and found["data"].dtype == np.uint8 and found["labels"] == [5]


def cifar100(root: Path, n: int = 2, **changed) -> None:
    root.mkdir(parents=True)
    meta = {"fine_label_names": ["apple", "aquarium_fish", *(f"thing_{i}" for i in range(98))], "coarse_label_names": [f"kind_{i}" for i in range(20)]}
    batch = {"data": np.arange(n * 3072).astype(np.uint8).reshape(n, 3072), "fine_labels": [0, 1][:n], "coarse_labels": [4, 1][:n]} | changed
    for name, content in (("meta", meta), ("train", batch), ("test", batch)): (root / name).write_bytes(pickle.dumps(content, protocol=2))


def test_cifar100(tmp_path):
    cifar100(tmp_path / "cifar100/cifar-100-python")
    data = open_set("cifar-100", root=tmp_path)
    assert list(answers(data).values()) == ["apple", "aquarium fish"] and data.data.table["coarse class"].tolist()[2:] == ["kind_4", "kind_1"]
    picture = np.asarray(data.data.pictures[0])
    assert picture[0, :3].tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]] and picture[1, 0, 0] == 32 and picture[31, 31, 2] == 3071 % 256   # re-stated: planes, then rows
    cifar100(tmp_path / "wrong/cifar-100-python", data=np.zeros((2, 100), np.uint8))
    with pytest.raises(LayoutError, match=r"data of \(2, 100\), uint8; expected \(pictures, 3072\)"): open_set("cifar100", tmp_path / "wrong")
    cifar100(tmp_path / "short/cifar-100-python", fine_labels=[0])
    with pytest.raises(LayoutError, match="2 pictures, and 1 fine_labels; expected one each"): open_set("cifar100", tmp_path / "short")


def test_idx_faults(tmp_path):
    good = b"\0\0\x08\x02" + struct.pack(">2I", 2, 3) + bytes(range(6))
    (tmp_path / "a").write_bytes(good)
    assert idx(tmp_path / "a").tolist() == [[0, 1, 2], [3, 4, 5]]
    for name, data, why in (("b", good[:-1], "promises 2 x 3 values, 5 follow"), ("c", b"PNG!", "does not start like an IDX"), ("d", b"", "found nothing"), ("e.gz", gzip.compress(good)[:-4], "not a whole gzip"), ("f", b"\0\0\x08\x02\0", "promises")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(LayoutError, match=why): idx(tmp_path / name)


def test_stl_and_svhn_faults(tmp_path):
    write(tmp_path, **{"class_names.txt": "a\nb\n"})
    for split in ("train", "test"): (tmp_path / f"{split}_X.bin").write_bytes(bytes(27648)); (tmp_path / f"{split}_y.bin").write_bytes(bytes([3]))
    with pytest.raises(LayoutError, match="label 3 of picture 0; expected 1 to 2"): open_set("stl10", tmp_path)
    (tmp_path / "train_y.bin").write_bytes(bytes([1, 1]))
    with pytest.raises(LayoutError, match="27648 bytes for 2 labels"): open_set("stl10", tmp_path)
    for split in ("train", "test"): savemat(tmp_path / f"{split}_32x32.mat", {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": [[1], [2], [3]]})
    with pytest.raises(LayoutError, match="2 pictures and 3 labels"): open_set("svhn", tmp_path)


# ------------------------------------------------------------------------------------------------ webdatasets and tables of the hub

def shard(file: Path, *parts: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for i, part in enumerate(parts):
            for suffix, data in part.items():
                entry = tarfile.TarInfo(f"s{i:07d}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def small_webdataset(root: Path) -> Path:
    for j in range(11): shard(root / "test" / f"{j}.tar", {"png": encoded(j), "cls": str(j % 2).encode()})
    write(root, **{"test/nshards.txt": "11\n", "classnames.txt": "cat\ndog\n", "zeroshot_classification_templates.txt": "a photo of a {c}.\n{c}\n"})
    return root


def test_shards_in_the_order_of_their_numbers(tmp_path):
    data = open_set(small_webdataset(tmp_path))
    assert [f.split("/")[1] for f in data.data.table.file] == [str(j) for j in range(11)]          # not 0, 1, 10, 2
    assert data.target().labels.tolist() == [j % 2 for j in range(11)] and data.target().templates == ["a photo of a {}.", "{}"]
    assert data.data.pictures.encoded(10) == encoded(10)
    with (tmp_path / "test/10.tar").open("r+b") as file: file.truncate(600)
    with pytest.raises(OSError, match="10.tar is not a complete tar file"): open_set(tmp_path)


def test_pictures_in_shards_travel_to_workers(tmp_path):
    data = open_set(small_webdataset(tmp_path)).data
    again = pickle.loads(pickle.dumps(data.pictures))
    assert len(pickle.dumps(data.pictures)) < 5000 and again.encoded(3) == encoded(3) and isinstance(again[1:4], StoredPictures)
    assert data.select([2, 1]).data_hash != data.select([1, 2]).data_hash


def test_a_webdataset_of_a_known_set_keeps_its_own_order(tmp_path):
    """clip-benchmark's Caltech101 of VTAB has another order of classes than its Caltech101; the numbers belong to the names beside them."""
    names = sorted(words("caltech101").classnames)
    shard(tmp_path / "test/0.tar", {"jpg": encoded(), "cls": b"2"})
    write(tmp_path, **{"classnames.txt": "\n".join(names)})
    assert list(answers(open_set("caltech101", tmp_path)).values()) == [names[2]]


def test_fetch_only_when_asked(tmp_path, monkeypatch):
    import huggingface_hub
    asked = []
    def snapshot(repo, repo_type, local_dir, allow_patterns):
        asked.append((repo, repo_type, allow_patterns))
        return str(small_webdataset(Path(local_dir)))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(LayoutError, match="no folder mnist/ below"): open_set("mnist", root=tmp_path)
    assert asked == []
    data = open_set("mnist", root=tmp_path, download="webdataset")
    assert asked == [("clip-benchmark/wds_mnist", "dataset", ["*.txt", "test/*"])] and len(data.data) == 11
    assert open_set("mnist", root=tmp_path).target().classnames == ["cat", "dog"] and len(asked) == 1
    with pytest.raises(ValueError, match="expected webdataset or hf"): open_set("mnist", root=tmp_path, download="torrent")
    with pytest.raises(ValueError, match="not in the registry"): open_set(tmp_path, download="hf")


@pytest.fixture
def table(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="pip install 'clip_lab[datasets]'")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["Forest", "River"])})
    return datasets, datasets.Dataset.from_dict({"image": [{"bytes": encoded(i), "path": None} for i in range(3)], "label": [1, 0, -1]}, features=features)


def test_hub_tables_on_the_disk(table, tmp_path, monkeypatch):
    datasets, rows = table
    datasets.DatasetDict(validation=rows).save_to_disk(str(tmp_path / "eurosat"))
    data = open_set("eurosat", root=tmp_path)
    assert list(answers(data).values()) == ["river", "forest"] and data.facts["names of class"] == "by key"    # -1: the label was kept back
    assert data.data.pictures.encoded(2) == encoded(2)
    (tmp_path / "parquet/data").mkdir(parents=True)
    rows.to_parquet(tmp_path / "parquet/data/test-00000-of-00001.parquet")
    assert form_of(tmp_path / "parquet") == "hf" and list(answers(open_set("eurosat", tmp_path / "parquet")).values()) == ["river", "forest"]
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(test=rows) if name == "ylecun/mnist" else None)
    own = open_set("mnist", root=tmp_path, download="hf")
    assert own.target().classnames == ["Forest", "River"] and own.facts["names of class"] == "the files' own words"


def test_hub_tables_with_several_labels_captions_and_faults(table):
    datasets, rows = table
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.Sequence(datasets.ClassLabel(names=["a", "b", "c"]))})
    several = datasets.Dataset.from_dict({"image": [{"bytes": encoded(i), "path": None} for i in range(2)], "labels": [[0, 2], []]}, features=features)
    found = hubs.hub_table(several)
    assert found.labels["class"] == [("a", "c"), ()] and found.splits == {"test": [0, 1]}
    said = rows.remove_columns("label").add_column("caption", ["one", "two", "three"])
    assert hubs.hub_table(said).captions == [["one"], ["two"], ["three"]]
    with pytest.raises(LayoutError, match="no column of pictures"): hubs.hub_table(rows.remove_columns("image"))
    with pytest.raises(LayoutError, match="no column 'breed'"): hubs.hub_table(rows, label="breed")


# ------------------------------------------------------------------------------------------------ found, and the sets as a whole

def test_draw_is_repeatable_and_complete():
    a, b = (draw_splits(range(15000), {"train": 10000, "test": 5000}, seed=3) for _ in range(2))
    assert all((a[s] == b[s]).all() for s in a) and sorted(np.concatenate(list(a.values()))) == list(range(15000))
    assert (draw_splits(range(15000), {"train": 10000, "test": 5000}, seed=4)["test"] != a["test"]).any()


def test_drawn_splits_in_a_set(tmp_path):
    draw(tmp_path, *(f"Forest/{i}.jpg" for i in range(6)), *(f"River/{i}.jpg" for i in range(6)))
    data = open_set("eurosat", tmp_path, seed=0)
    assert {s: len(p) for s, p in data.target().splits.items()} == {"train": 8, "test": 4} and "seed 0" in data.facts["splits"]


def test_stored_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"0123456789")
    assert Stored(tmp_path / "f", 3, 4).read() == b"3456"
    with pytest.raises(ValueError, match="float64"): pixels(np.zeros((2, 2)))


def test_where_sets_are_looked_for(tmp_path, monkeypatch):
    draw(tmp_path, "EuroSAT/x.txt/y.png", "resisc45/airplane/1.jpg", "oxford-pets/images/1.jpg")
    monkeypatch.setenv("CLIP_LAB_DATA", str(tmp_path))
    assert find_set("RESISC45") == tmp_path / "resisc45" and find_set("pets") == tmp_path / "oxford-pets" and find_set("mnist") is None
    with pytest.raises(LayoutError, match="one class only .airplane."): open_set("resisc45")
    listed = list_sets().set_index("name")
    assert listed.here["pets"] == "own" and listed.here["mnist"] == "" and len(listed) == len(cards())
    assert show_set("pets")["folder"] == str(tmp_path / "oxford-pets") and show_set("pets")["layout"].startswith("images/*.jpg")
    monkeypatch.delenv("CLIP_LAB_DATA")
    with pytest.raises(LayoutError, match="set CLIP_LAB_DATA"): open_set("resisc45")


def test_an_archive_beside_its_content_is_no_shard(tmp_path):
    draw(tmp_path, "Forest/1.jpg", "River/2.jpg")
    (tmp_path / "EuroSAT.tar").write_bytes(b"whatever")
    assert form_of(tmp_path) == "own" and len(open_set("eurosat", tmp_path).data) == 2


def test_check_of_a_part_of_a_set(tmp_path):
    """STL-10 with all classes and too few pictures: only the sizes differ, and folds are no splits to be checked."""
    write(tmp_path, **{"class_names.txt": "\n".join(f"c{i}" for i in range(10))})
    for split, n in (("train", 100), ("test", 200)):
        (tmp_path / f"{split}_X.bin").write_bytes(bytes(27648 * n)); (tmp_path / f"{split}_y.bin").write_bytes(bytes(1 + i % 10 for i in range(n)))
    write(tmp_path, **{"fold_indices.txt": "0 1 2\n3 4 5\n"})
    report = check_set("stl10", tmp_path, limit=3)
    told = report.table.set_index("what")
    assert told.verdict.to_dict() == {"classes of class": "ok", "train pictures": "differs", "test pictures": "differs", "classes of class without a test picture": "ok",
                                      "listed pictures that are missing": "ok", "broken pictures": "ok"}
    assert told.note["broken pictures"] == "3 of 300 decoded" and not report.ok


@pytest.mark.parametrize("name, found, verdicts", [
    ("dtd", {"train": 1880, "validation": 1880, "test": 1880}, {"train pictures": "ok", "validation pictures": "", "test pictures": "ok"}),          # the paper counts both as training
    ("eurosat", {"test": 27000}, {"train pictures": "", "test pictures": "ok"}), ("eurosat", {"test": 26999}, {"train pictures": "", "test pictures": "differs"}),
    ("stl10", {"train": 5000, "test": 8000}, {"train pictures": "ok", "test pictures": "ok"}), ("imagenet", {"test": 50000}, {"train pictures": "", "test pictures": "ok"}),
    ("country211", {"train": 31650, "validation": 10550, "test": 21100}, {"train pictures": "ok", "validation pictures": "ok", "test pictures": "ok"}),
    ("celeba", {"train": 162770, "validation": 19867, "test": 19962}, {"train pictures": "ok", "validation pictures": "ok", "test pictures": "ok"}),
    ("mnist", {"train": 100, "test": 10000}, {"train pictures": "differs", "test pictures": "ok"})])
def test_verdicts_on_sizes(name, found, verdicts):
    assert {line["what"]: line["verdict"] for line in sets._sizes(card(name), found)} == verdicts


def test_check_counts_what_is_broken(tmp_path):
    draw(tmp_path, "cat/1.png", "cat/2.png", "dog/3.png")
    assert check_set(tmp_path).ok
    (tmp_path / "cat/2.png").write_bytes(b"no picture")
    report = check_set(tmp_path)
    assert not report.ok and report.examples[0][0] == "cat/2.png" and report.table.set_index("what").found["broken pictures"] == "1"


def test_gather_is_strict(tmp_path):
    with pytest.raises(LayoutError, match="no pictures; found an empty folder"): gather(tmp_path, [])
    draw(tmp_path, "1.png")
    found = gather(tmp_path, [Row("1.png", {"race": "x", "age": None}, "test")])
    assert list(found.labels) == ["race"]


def test_every_layout_has_a_card():
    assert set(LAYOUTS) < set(cards()) and len(LAYOUTS) == 36


def test_a_folder_named_from_where_one_stands_is_the_same(tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "#E69F00" if name == "cat" else "#0072B2").save(tmp_path / "mine" / name / "a.png")
    monkeypatch.chdir(tmp_path)
    near, far = open_set("mine"), open_set(tmp_path / "mine")
    assert near.data.data_hash == far.data.data_hash and list(near.targets["class"].classnames) == ["cat", "dog"]
